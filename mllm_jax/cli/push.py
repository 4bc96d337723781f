"""Uploads an export, or a run, to the Hugging Face hub.

    mllm-jax push exported me/my-model --private
    mllm-jax push runs/quickstart me/my-model --message "quickstart, seed 0"
    mllm-jax push exported me/my-model --dry-run          # lists what would be uploaded; needs no network

The first argument is a folder that `mllm-jax export` wrote, in any format, or a run of train.py (also gs://), which is
exported first (`--format`, by default `safetensors`). A folder without a model card (README.md), or without what says
which model it is, is refused; hidden files stay here. A repository that is not there yet is made.

The token is that of `hf auth login`, or `HF_TOKEN`; `HF_ENDPOINT` names another server. Exit code 0: uploaded, and the
commit's address is printed.
"""

import argparse
import pathlib
import tempfile

from mllm_jax.cli.export import FORMATS
from mllm_jax.console import complain, size_text
from mllm_jax.storage import as_path

BUCKETS = ("",)
DESCRIPTIONS = (
    "model.json",
    "config.json",
    "adapter_config.json",
)  # one of them says which model a folder holds
WEIGHTS, ORBAX = (".safetensors", ".bin"), "params"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "source", metavar="EXPORT|RUN", help="a folder that `mllm-jax export` wrote, or a run"
    )
    parser.add_argument("repository", metavar="OWNER/NAME", help="on the hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make it private; refuse one that is public")
    parser.add_argument("--revision", default="main", help="branch to upload to, made if it is not there")
    parser.add_argument("--message", help="of the commit (default: what is uploaded)")
    parser.add_argument("--format", choices=FORMATS, help="of a run's export (default safetensors)")
    parser.add_argument("--stage", help="of a run (default: the last one that is finished)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and stop")


def run(args: argparse.Namespace) -> int:
    """Uploads; 1 with a message when that cannot be."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from mllm_jax.inference import runs

    try:
        validate_repo_id(args.repository)
        if runs.is_run(as_path(args.source)):
            with tempfile.TemporaryDirectory() as folder:
                target = pathlib.Path(folder) / args.repository.rsplit("/", 1)[-1]
                return _export(args, target) or _push(args, target, f"{args.source}")
        for name in ("format", "stage"):
            if getattr(args, name):
                raise ValueError(f"--{name} is for a run, and {args.source} is none; leave it out")
        return _push(args, pathlib.Path(args.source).expanduser(), pathlib.Path(args.source).name)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = (
            "; `hf auth login`, or HF_TOKEN with a token that may write there" if status in (401, 403) else ""
        )
        complain(f"mllm-jax push: {' '.join(str(error).split())}{hint}")
    except (OSError, RuntimeError, ValueError, HFValidationError) as error:
        complain(f"mllm-jax push: {error}")
    return 1


def _export(args: argparse.Namespace, target: pathlib.Path) -> int:
    from mllm_jax.cli import export

    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    given = ["--from", args.source, "--to", str(target), "--format", args.format or "safetensors"]
    return export.run(parser.parse_args([*given, *(["--stage", args.stage] if args.stage else [])]))


def _push(args: argparse.Namespace, folder: pathlib.Path, what: str) -> int:
    """Uploads a folder.

    Raises:
      FileNotFoundError, ValueError: it is no export; or the repository is public and was to be private.
      HfHubHTTPError: the hub says no.
    """
    files = uploaded(folder)
    print(f"{args.repository} ({args.revision}{', private' * args.private}):")
    for file in files:
        print(f"  {file.relative_to(folder).as_posix()}  {size_text(file.stat().st_size)}")
    if args.dry_run:
        return 0
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ValueError("no token: `hf auth login`, or HF_TOKEN=...")
    api = HfApi()
    api.create_repo(args.repository, private=args.private or None, exist_ok=True)
    if args.private and not api.repo_info(args.repository).private:
        raise ValueError(
            f"{args.repository} is there and public; make it private in its settings, or leave out --private"
        )
    if args.revision != "main":
        api.create_branch(args.repository, branch=args.revision, exist_ok=True)
    done = api.upload_folder(
        repo_id=args.repository,
        folder_path=folder,
        allow_patterns=[file.relative_to(folder).as_posix() for file in files],
        revision=args.revision,
        commit_message=args.message or f"Upload {what}",
    )
    print(f"uploaded: {done.commit_url}")
    return 0


def uploaded(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of an export that are uploaded: all but hidden ones.

    Raises:
      FileNotFoundError: no such folder, or no model card, description or weights in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(folder)!r}; give one that `mllm-jax export` wrote, or a run"
        )
    if not (folder / "README.md").is_file():
        raise FileNotFoundError(f"{folder} has no README.md (a model card); `mllm-jax export` writes one")
    if not any((folder / name).is_file() for name in DESCRIPTIONS):
        raise FileNotFoundError(
            f"{folder} holds none of {', '.join(DESCRIPTIONS)}, so nobody could tell what it is"
        )
    names = {file: file.relative_to(folder).parts for file in sorted(folder.rglob("*")) if file.is_file()}
    found = [file for file, parts in names.items() if not any(part.startswith(".") for part in parts)]
    if not any(names[file][0] == ORBAX or file.suffix in WEIGHTS for file in found):
        raise FileNotFoundError(f"{folder} holds no weights (*{', *'.join(WEIGHTS)}, {ORBAX}/)")
    return found
