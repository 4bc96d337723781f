"""torch's side of gpu.py: transformers' LLaVA with SDPA, eager, bfloat16; each result is a line of JSON in --out."""

import argparse
import json
import pathlib
import statistics
import time

import numpy as np
import torch
from gpu_shapes import LLAVA, TINY, Shapes, model_flops, packed_rows
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """Until the device has done everything."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(call, calls: int, groups: int = 3) -> float:
    """Median over groups of the seconds of one call."""
    call()
    found = []
    for _ in range(groups):
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        found.append((time.perf_counter() - begin) / calls)
    return statistics.median(found)


def make_model(shapes: Shapes, layers: int) -> LlavaForConditionalGeneration:
    """Random weights in bfloat16, made on the device."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**without_type(shapes.vision)),
        text_config=LlamaConfig(**without_type(shapes.llm) | {"num_hidden_layers": layers}),
        image_token_index=shapes.llm["vocab_size"] - 1,
        image_token_id=shapes.llm["vocab_size"] - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)


def without_type(fields: dict) -> dict:
    """The fields of a `config.json` that a configuration class takes."""
    return {key: value for key, value in fields.items() if key != "model_type"}


def rows_of(shapes: Shapes, rows: int, length: int, images: int) -> dict:
    """Full rows: `images` images a row, then random text."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    vocab, side = shapes.llm["vocab_size"], shapes.vision["image_size"]
    tokens = torch.randint(1, vocab - 1, (rows, length), generator=generator, device=DEVICE)
    tokens[:, : images * shapes.visual] = vocab - 1
    pixels = torch.randn(rows * images, 3, side, side, generator=generator, device=DEVICE)
    return {"input_ids": tokens, "pixel_values": pixels.to(torch.bfloat16)}


def train(stage: str, shapes: Shapes, args: argparse.Namespace):
    """Steps of a stage, with as many layers as fit; then, out of memory, with gradient checkpointing."""
    depths = shapes.depths if stage == "finetune" else shapes.depths[:1]
    tries = [(layers, checkpointing) for layers in depths for checkpointing in (False, True)]
    for layers, checkpointing in tries:
        try:
            yield step_time(stage, shapes, layers, checkpointing, args)
            return
        except torch.OutOfMemoryError:
            if (layers, checkpointing) == tries[-1]:
                raise
        torch.cuda.empty_cache()


def step_time(stage: str, shapes: Shapes, layers: int, checkpointing: bool, args: argparse.Namespace) -> dict:
    """Time, tokens and memory of a step."""
    shape = shapes.stages[stage]
    needs = [sum(samples) for samples in packed_rows(stage, shapes)]  # of all samples of each row
    images, labels = (max(1, int(np.mean([each[i] for each in needs]))) for i in (1, 2))
    model = make_model(shapes, layers).train().requires_grad_(False)
    trained = [model.model.multi_modal_projector.float()]
    if stage == "finetune":
        llm = [model.model.language_model, model.lm_head]
        trained += [part.float() for part in llm] if args.param_dtype == "float32" else llm
    for part in trained:
        part.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = rows_of(shapes, shape.rows, shape.length, images)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, : shape.length - labels] = -100
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=DEVICE == "cuda")

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    seconds = timed(step, max(1, shapes.steps // 3))
    loss = float(step().detach())
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss of random weights is {loss}")
    full = [np.array([shape.length, images, labels, 1])] * shape.rows
    how = "gradient checkpointing" if checkpointing else "activations kept"
    return {
        "seconds": seconds,
        "layers": layers,
        "shape": f"{shape.rows} x {shape.length}",
        "tokens_per_second": shape.rows * shape.length / seconds,
        "model_flops": model_flops(stage, shapes, layers, full, stage == "finetune"),
        "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0,
        "loss": loss,
        "note": f"torch {torch.__version__}, SDPA, full rows without segments, {how}",
    }


@torch.inference_mode()
def decode(shapes: Shapes, args: argparse.Namespace):
    """Greedy answers of a fixed length to prompts with an image."""
    model = make_model(shapes, shapes.depths[0]).eval()
    for size in shapes.batches:
        batch = rows_of(shapes, size, shapes.visual + shapes.prompt, 1)
        options = {
            "max_new_tokens": shapes.new_tokens,
            "min_new_tokens": shapes.new_tokens,
            "do_sample": False,
        }
        mask = torch.ones_like(batch["input_ids"])
        seconds = timed(
            lambda batch=batch, mask=mask, options=options: model.generate(
                **batch, attention_mask=mask, pad_token_id=0, **options
            ),
            1,
        )
        yield {
            "batch": size,
            "seconds": seconds,
            "new_tokens": shapes.new_tokens,
            "tokens_per_second": size * shapes.new_tokens / seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="+", choices=("pretrain", "finetune", "decode"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--param_dtype", default="bfloat16")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    shapes = TINY if args.tiny else LLAVA
    for name in args.sections:
        for result in decode(shapes, args) if name == "decode" else train(name, shapes, args):
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps({"side": "torch", "section": name, **result}) + "\n")


if __name__ == "__main__":
    main()
