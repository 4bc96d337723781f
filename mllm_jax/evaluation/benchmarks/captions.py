"""COCO captions (Chen et al. 2015), and how captions are scored: BLEU-1..4, ROUGE-L, CIDEr, METEOR.

The headline is CIDEr. Captions are tokenized by the official Java program where it is installed, else
by our own (the result says which). METEOR exists in Java only: where it cannot run, the result says so
under `METEOR_absent`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation import caption_java, caption_metrics, ptb_tokenizer
from mllm_jax.evaluation import predictions as reading
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers
from mllm_jax.evaluation.benchmarks.base import Benchmark, Question
from mllm_jax.evaluation.benchmarks.published import File, Option, Published, Upload
from mllm_jax.evaluation.benchmarks.question_files import read_json as read_question_json
from mllm_jax.evaluation.predictions import BenchmarkError, PredictionError, Row, as_text, take
from mllm_jax.evaluation.store import Key
from mllm_jax.storage import Path

TOKENIZERS = ("auto", "java", "python", "none")
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
_COCO = "https://cocodataset.org/#download"


def _tokenizer(name: str) -> tuple[str, Callable[[Sequence[str]], list[str]]]:
    if name not in TOKENIZERS:
        raise ValueError(f"no tokenizer {name!r}; there are {TOKENIZERS}")
    if name == "none":
        return "none (captions are tokenized already)", list
    if name == "java" or (name == "auto" and not caption_java.missing()):
        return "PTBTokenizer (Java)", caption_java.tokenize
    return "PTBTokenizer rules (mllm_jax, no Java)", ptb_tokenizer.tokenize


def score_captions(
    said: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "auto"
) -> dict[str, Any]:
    """All metrics of captions, each with its references.

    Returns:
        `Bleu_1` .. `Bleu_4`, `ROUGE_L`, `CIDEr`, and `METEOR` or `METEOR_absent`; `tokenizer`.
    """
    name, tokenize = _tokenizer(tokenizer)
    wanted = iter(tokenize([caption for captions in references for caption in captions]))
    refs = [[next(wanted) for _ in captions] for captions in references]
    said = tokenize(list(said))
    figures: dict[str, Any] = {f"Bleu_{n}": v for n, v in enumerate(caption_metrics.bleu(said, refs), 1)}
    rouge = [caption_metrics.rouge_l(s, r) for s, r in zip(said, refs, strict=True)]
    figures["ROUGE_L"] = caption_metrics.mean(rouge)
    figures["CIDEr"] = caption_metrics.mean(caption_metrics.cider(said, refs))
    if reason := caption_java.missing():
        figures["METEOR_absent"] = reason
    else:
        figures["METEOR"] = caption_java.meteor(said, refs)[0]
    return figures | {"tokenizer": name}


class CaptionScores(Benchmark):
    """Captions against references; no caption is right or wrong by itself."""

    rule = "pycocoevalcap 1.2 (COCO caption tools)"
    answers_format = "JSON array {image_id, caption}, LLaVA JSON lines {question_id, text}, or id -> caption"
    annotations_format = "id -> reference captions, or COCO's captions_*.json"
    score_options = ("tokenizer",)
    id_keys = ("image_id", "question_id", "id")
    text_keys = ("caption", "text", "answer")
    keyed = True
    in_annotation_order = True  # as the official tools
    comparable = False

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        return (text, "caption") if text.strip() else (None, "unparsed")

    @classmethod
    def credits_in(cls, predictions: Path, annotations: Path | None) -> dict[Key, float]:
        return {}

    @classmethod
    def stored(cls, row: Row, where: str) -> Any:
        value = take(row, cls.text_keys, where)
        return value[0] if isinstance(value, list) and value else value

    @classmethod
    def read_annotations(cls, path: Path) -> dict[str, Row]:
        value = reading.read_annotations(path)
        references: dict[str, list[str]] = {}
        if isinstance(value, dict) and isinstance(value.get("annotations"), list):
            for row in value["annotations"]:
                key = str(take(row, cls.id_keys, str(path)))
                references.setdefault(key, []).append(as_text(take(row, cls.text_keys, str(path))))
        else:
            for key, found in reading.entries(value, cls.id_keys, path):
                if isinstance(found, dict):
                    found = take(found, ("references", "answer", "captions"), str(path))
                references[key] = [as_text(one) for one in (found if isinstance(found, list) else [found])]
        if not references or not all(references.values()):
            raise PredictionError(f"{path}: expected id -> list of captions, or COCO's captions_*.json")
        return {key: {"references": captions} for key, captions in references.items()}

    @classmethod
    def grade(cls, answer: Answer) -> None:
        """Credits nothing: captions are scored together."""

    @classmethod
    def figures(cls, answers: Answers, tokenizer: str = "auto") -> dict[str, Any]:
        if not answers:
            raise PredictionError(f"{cls.name}: no caption for any image of the annotations")
        references = [answer.item["references"] for answer in answers]
        figures = score_captions([answer.text for answer in answers], references, tokenizer)
        return {"score": figures["CIDEr"], "n_references": sum(map(len, references)), **figures}


class Captions(CaptionScores, Published):
    """Captions of COCO images."""

    name = "captions"
    max_new_tokens = 64
    upload = Upload("captions_results.json", "the COCO caption tools")
    options: ClassVar = {
        "split": Option("val2017", "which images", ("val2017", "val2014")),
        # lmms-eval's words; papers differ here, and scores with them.
        "prompt": Option(CAPTION_PROMPT, "the request for a caption"),
    }
    files: ClassVar = {
        "questions": File(("captions_{split}.json", "annotations/captions_{split}.json"), _COCO),
        "images": File(("{split}",), _COCO),
    }

    def items(self) -> Iterator[Question]:
        (path,) = self.paths("questions")
        self.files_read.append(path)
        value = read_question_json(path)
        if not isinstance(value, dict) or not {"images", "annotations"} <= value.keys():
            raise BenchmarkError(f"{path}: expected COCO's object with 'images' and 'annotations'")
        references: dict[int, list[str]] = defaultdict(list)
        for row in value["annotations"]:
            references[row["image_id"]].append(row["caption"])
        for image in value["images"]:
            number, captions = image["id"], references[image["id"]]
            yield self.question(
                number,
                str(self.values["prompt"]),
                [image["file_name"]],
                captions or None,
                fields={"image_id": number},
                truth={"image_id": number, "references": captions},
            )

    def submission(self, rows: Sequence[Row]) -> Any:
        return [{"image_id": row["image_id"], "caption": row["text"]} for row in rows]
