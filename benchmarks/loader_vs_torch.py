"""Decoded and preprocessed images a second: our input pipeline against a torch DataLoader as LLaVA uses it.

    python benchmarks/loader_vs_torch.py                          # JPEG files made here
    python benchmarks/loader_vs_torch.py --images=coco/train2017  # your own; the tables below say which were used
    python benchmarks/loader_vs_torch.py --stages                 # where our time goes, one thread

Ours reads files, decodes, pads, resizes, tokenizes a short conversation and stacks rows of uint8 in `--workers`
threads; the model normalises on the device. torch reads files, decodes, pads (`expand2square`) and calls transformers'
CLIPImageProcessor in as many worker processes, and stacks float32 tensors; it tokenizes nothing. Pixels are equal bit
for bit (tests/data/test_preprocessing.py). The sides take turns, each time in a new process, over every image once.
"""

import argparse
import collections
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import page
from PIL import Image

SIZE, BATCH = 336, 32


def make_images(folder: pathlib.Path, count: int) -> None:
    """JPEG files of 640 x 480 (some upright) with edges, smooth areas and noise, about 100 kB each."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for index in range(count):
        shape = (480, 640) if index % 4 else (640, 480)
        coarse = rng.integers(0, 256, (shape[0] // 40, shape[1] // 40, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC), np.int16)
        pixels = (smooth + rng.normal(0, 12, (*shape, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.jpg", quality=85)


def ours(paths: list[pathlib.Path], workers: int) -> float:
    """Images a second of one epoch."""
    from mllm_jax.data.layout import Slot, WholeImage
    from mllm_jax.data.llava_json import Record
    from mllm_jax.data.pipeline import make_train_iterator
    from mllm_jax.data.preprocessing import ImageProcessor
    from mllm_jax.data.rows import ImageReader, RowEncoder
    from mllm_jax.data.samples import FolderSource
    from mllm_jax.interop import load_tokenizer

    turns = (
        {"from": "human", "value": "<image>\nWhat is in the image?"},
        {"from": "gpt", "value": "A red circle left of a blue square."},
    )
    records = [Record(path.stem, (path.name,), turns) for path in paths]
    encoder = RowEncoder(
        ImageReader(ImageProcessor.clip(SIZE, aspect="pad"), compat="llava"),
        WholeImage(Slot(64, size=(SIZE, SIZE))),
        load_tokenizer("mini"),
        "plain",
        seq_len=256,
        image_slots=1,
    )
    source = FolderSource(records, paths[0].parent)
    for warm in (True, False):
        samples = source if not warm else FolderSource(records[:BATCH], paths[0].parent)
        begin = time.perf_counter()
        with make_train_iterator(
            [samples], encoder, batch_size=BATCH, seed=0, num_threads=workers
        ) as batches:
            read = sum(name != "" for batch in batches for name in batch.ids)  # the last batch has empty rows
        seconds = time.perf_counter() - begin
    return read / seconds


def torch(paths: list[pathlib.Path], workers: int) -> float:
    """Images a second of one epoch, as LLaVA's `LazySupervisedDataset` prepares them."""
    from torch.utils.data import DataLoader, Dataset

    try:
        from transformers import CLIPImageProcessorPil as Processor  # transformers 5 without torchvision
    except ImportError:
        from transformers import CLIPImageProcessor as Processor
    processor = Processor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    fill = tuple(int(value * 255) for value in processor.image_mean)

    class Images(Dataset):
        def __init__(self, paths):
            self.paths = paths

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            image = Image.open(self.paths[index]).convert("RGB")
            width, height = image.size
            if width != height:  # expand2square
                side = max(width, height)
                square = Image.new("RGB", (side, side), fill)
                square.paste(image, ((side - width) // 2, (side - height) // 2))
                image = square
            return processor(image, return_tensors="pt")["pixel_values"][0]

    for chosen in (paths[:BATCH], paths):
        begin = time.perf_counter()
        read = sum(len(batch) for batch in DataLoader(Images(chosen), BATCH, num_workers=workers))
        seconds = time.perf_counter() - begin
    return read / seconds


def stages(paths: list[pathlib.Path]) -> dict[str, float]:
    """Milliseconds of an image in each part of our reader, one thread."""
    from mllm_jax.data.images import open_rgb
    from mllm_jax.data.preprocessing import ImageProcessor

    processor = ImageProcessor.clip(SIZE, aspect="pad")
    spent: collections.Counter[str] = collections.Counter()
    for path in paths:
        times = [time.perf_counter()]
        data = path.read_bytes()
        times.append(time.perf_counter())
        image = open_rgb(data, source=path.name, compat="llava")
        times.append(time.perf_counter())
        processor(image)
        times.append(time.perf_counter())
        for name, begin, end in zip(("read", "decode", "pad and resize"), times, times[1:], strict=False):
            spent[name] += 1e3 * (end - begin) / len(paths)
    return dict(spent)


SIDES = {"ours": ours, "torch": torch}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=pathlib.Path, help="folder of JPEG files (default: made here)")
    parser.add_argument("--count", type=int, default=512, help="images of an epoch; files are repeated")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", action="store_true", help="only say where our time goes")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = args.images or pathlib.Path(made)
        if args.images is None:
            make_images(folder, 64)
        files = sorted(folder.glob("*.jpg"))
        if not files:
            raise SystemExit(f"{folder} holds no .jpg files")
        paths = [files[index % len(files)] for index in range(args.count)]
        if args.side:
            print(SIDES[args.side](paths, args.workers))
            return
        if args.stages:
            for name, milliseconds in stages(paths).items():
                print(f"{name}: {milliseconds:.2f} ms an image")
            return
        command = [sys.executable, __file__, f"--images={folder}", f"--count={args.count}"]
        found: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side, rates in found.items():
                done = subprocess.run(
                    [*command, f"--workers={args.workers}", f"--side={side}"], capture_output=True, text=True
                )
                if done.returncode:
                    raise SystemExit(f"{side}: {done.stderr}")
                rates.append(json.loads(done.stdout.split()[-1]))
        kilobytes = sum(path.stat().st_size for path in files) / len(files) / 1e3
        with Image.open(files[0]) as image:
            about = f"{len(files)} {'files of ' + args.images.name if args.images else 'made images'}"
            about += f", the first of {image.width} x {image.height}, {kilobytes:.0f} kB on average"
    rows = [
        (
            f"{side}, {args.workers} {'threads' if side == 'ours' else 'processes'}",
            page.spread(rates, 0),
        )
        for side, rates in found.items()
    ]
    ratio = statistics.median(found["ours"]) / statistics.median(found["torch"])
    text = "## Image loader\n\nDecoded and preprocessed images per second, against torch's `DataLoader` with LLaVA's "
    text += (
        "preprocessing; the pixels are the same, bit for bit (`python benchmarks/loader_vs_torch.py`).\n\n"
    )
    text += page.table(("side", "images/s"), rows)
    text += (
        f"\n\nOurs is {ratio:.2f} × as fast. {args.rounds} rounds in turn over {args.count} images: {about}; "
    )
    text += page.machine("jax", "torch", "transformers", "pillow") + "."
    print(text)
    if args.write:
        page.write_section("loader", text)


if __name__ == "__main__":
    main()
