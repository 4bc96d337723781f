"""ChartQA test (Masry et al. 2022), human-written and machine-made questions apart."""

from collections import defaultdict
from collections.abc import Iterator
from typing import ClassVar

from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import File, hub
from mllm_jax.evaluation.benchmarks.relaxed_accuracy import RelaxedAccuracy
from mllm_jax.evaluation.benchmarks.short_answer import ShortAnswer


class ChartQa(ShortAnswer, RelaxedAccuracy):
    """ChartQA test, scored by relaxed accuracy."""

    name = "chartqa"
    rule = "lmms-eval chartqa (human and augmented splits)"
    not_asked = ""
    max_new_tokens = 16  # lmms-eval
    files: ClassVar = {
        "questions": File(
            ("test/test_*.json", "data/test-*.parquet"),
            f"{hub('ahmed-masry/ChartQA')} (the original files) or {hub('lmms-lab/ChartQA')} (Parquet)",
        ),
        "images": File(("test/png",), hub("ahmed-masry/ChartQA")),
    }

    def items(self) -> Iterator[Question]:
        counts: dict[str, int] = defaultdict(int)
        for path in self.paths("questions"):
            for row in self.read_table(path):
                # test_human.json and test_augmented.json, or human_test and augmented_test in a column.
                split = str(row.get("type") or path.stem).replace("test", "").strip("_")
                counts[split] += 1
                number, image = f"{split}_{counts[split]}", row.first("imgname", "image")
                gold = str(row.first("label", "answer"))
                truth = {"target": gold, "split": split}
                yield self.question(number, self.prompt(row), [image], gold, ability=split, truth=truth)
