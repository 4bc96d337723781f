"""What a step needs, by formula: memory of a chip in its parts, operations, traffic, and the time they bound.

Parameters, optimizer state, frozen parameters and batch are exact, from shapes and shardings. Activations, gathered
weights and traffic are formulas over the model's sizes. A search over meshes takes milliseconds for each, and machines
without a compiler (GPUs that are not here) have only this; docs/operating.md compares it with XLA's figures.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax.models import mllm, paths
from mllm_jax.parallel.chips import Chip
from mllm_jax.parallel.mesh import ROWS
from mllm_jax.planning.topology import Machine
from mllm_jax.training.flops import batch_counts
from mllm_jax.training.loss import CHUNK
from mllm_jax.training.stage import StagePlan

MEAN_TEXT_TOKENS = 220  # of a sample beside its image: about what LLaVA-665K has, where the data are not here
MEAN_LABEL_SHARE = 0.6  # of these, how many are supervised
WORKING = 1.25  # of what a block makes of its input, held while it is computed; found by compiling
TABLES = ("llm/embedding", "llm/head")
FEW = 32  # chips that share parameters, up to which TPUs send a part of a gradient once; found by compiling
# Products of attention's backward pass for two of its forward pass: kernels compute the logits again.
BACKWARD_PRODUCTS = {"splash": 7, "cudnn": 5, "tokamax": 5, "blockwise": 5, "xla": 4}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip.

    Attributes:
      parameters: trained ones.  optimizer: its state.  frozen: parameters that the stage does not train.
      batch: pixels, tokens and the like.
      temporaries: gradients, activations, gathered weights, logits.
      program: the compiled code.
    """

    parameters: float
    optimizer: float
    frozen: float
    batch: float
    temporaries: float
    program: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at least, for each resource of a chip alone.

    Attributes:
      compute: at the chip's peak, recomputation and padding included.
      memory: of reading and writing its memory.
      network: over the fast network.  slow_network: between slices or hosts.
      model_flops: of the whole step, what MFU counts.
      peak: operations per second of all chips.
    """

    compute: float
    memory: float
    network: float
    slow_network: float
    model_flops: float
    peak: float

    @property
    def seconds(self) -> float:
        """The slowest resource, with all others hidden behind it."""
        return max(self.compute, self.memory, self.network, self.slow_network)

    @property
    def bound(self) -> str:
        """Which resource that is."""
        return max(("compute", "memory", "network", "slow_network"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization that cannot be exceeded."""
        return self.model_flops / (self.seconds * self.peak)


def chip_bytes(tree: Any) -> float:
    """Bytes of one device's parts of arrays, from shapes with shardings."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def arguments(plan: StagePlan) -> dict[str, float]:
    """Exact bytes of a chip before the step: the fields of `Memory` that are arguments."""
    return {
        "parameters": chip_bytes(plan.state.params),
        "optimizer": chip_bytes(plan.state.opt_state),
        "frozen": chip_bytes(plan.frozen),
        "batch": chip_bytes(plan.batch),
    }


def memory(plan: StagePlan, attention: str) -> Memory:
    """The estimate for a stage on its mesh, which may be abstract.

    Args:
      attention: the backend that computes it.
    """
    given = arguments(plan)
    size = _Sizes(plan)
    cfg, model = plan.model.llm, plan.model
    width = jnp.dtype(model.dtype).itemsize
    positions = size.micro_rows * size.length  # of one chip, at a time

    # What a block makes of a position and its backward pass reads: two norms in float32 and rounded, two residuals;
    # queries and keys before and after they rotate, as the kernel takes them; five arrays of the gated MLP.
    heads = cfg.heads * cfg.head_width + cfg.kv_heads * cfg.head_width
    everything = positions * (
        2 * (4 + 3 * width) * cfg.width + 5 * width * (heads + cfg.mlp_width) / size.tensor
    )
    outputs = 2 * cfg.width + (heads + cfg.kv_heads * cfg.head_width + 2 * cfg.mlp_width) / size.tensor
    products = positions * width * outputs
    if attention == "xla":
        everything += 2 * 4 * positions * cfg.heads / size.tensor * plan.seq_len
    boundary = positions * width * cfg.width
    kept = {"full": boundary, "dots": boundary + products, "none": everything}[model.remat]
    activations = (cfg.depth * kept if size.backward else 0) + WORKING * everything
    # One block's weights whole over fsdp, while the next block's arrive.
    gathered = 2 * size.block_bytes / size.tensor if size.fsdp > 1 else 0
    gradients = given["parameters"] * (2 if plan.stage.accumulation > 1 else 1)
    vocabulary = cfg.vocab / size.tensor
    logits = 3 * 4 * size.micro_rows * min(CHUNK, size.labels) * vocabulary
    head = size.head_bytes + 2 * size.head_gradient  # of this chip, and the sum of all before it is cut
    after_blocks = gradients + logits + head + boundary * (cfg.depth if size.backward else 1)
    return Memory(**given, temporaries=max(gradients + activations + gathered, after_blocks) + size.images)


class _Sizes:
    """Numbers that several formulas share."""

    def __init__(self, plan: StagePlan):
        shape = plan.mesh.shape
        self.tensor, self.sequence, self.data = shape["tensor"], shape["sequence"], shape["data"]
        self.fsdp = shape["fsdp"] * self.sequence  # both share parameters
        self.length = plan.seq_len / self.sequence  # of a row, on one chip
        self.chips = math.prod(shape.values())
        self.rows = plan.rows or plan.stage.batch_size
        self.shards = math.prod(shape[axis] for axis in ROWS)
        self.micro_rows = max(1, self.rows / self.shards / plan.stage.accumulation)
        self.labels = plan.config.data.label_tokens or plan.seq_len
        trained, flat = paths.flatten(plan.state.params), paths.flatten(plan.frozen)
        self.encoder = any(path.startswith("vision/") for path in trained)
        self.backward = any(re.match(r"vision|connector|llm/(blocks/|embedding)", path) for path in trained)
        self.slots = plan.stage.image_slots or plan.config.data.image_slots
        width = jnp.dtype(plan.model.dtype).itemsize
        blocks = {path: leaf for path, leaf in (trained | flat).items() if path.startswith("llm/blocks/")}
        depth = plan.model.llm.depth

        def sent_bytes(pattern: str) -> int:
            found = [leaf for path, leaf in (trained | flat).items() if re.match(pattern, path)]
            return sum(leaf.size * min(width, leaf.dtype.itemsize) for leaf in found)

        self.block_bytes = sent_bytes("llm/blocks/") / depth
        self.attention_bytes = sent_bytes(r"llm/blocks/(.*/)?[qkvo]/kernel$") / depth
        self.tower_bytes = 0 if plan.stage.cache_features else sent_bytes("vision/")
        self.trained_block_bytes = sum(
            leaf.size * width for path, leaf in trained.items() if path.startswith("llm/blocks/")
        )
        # In the dtype of the computation, but for the tables, which are added up in float32.
        self.chip_gradient_bytes = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * (4 if path in TABLES else width)
            for path, leaf in trained.items()
        )
        self.last_share = sum(
            leaf.size for path, leaf in blocks.items() if re.search(r"/(down|fc2)/", path)
        ) / max(1, sum(leaf.size for leaf in blocks.values()))
        head = plan.model.llm.width * plan.model.llm.vocab / self.tensor
        self.head_bytes = width * head  # as a chip uses it; its gradient there, before chips add theirs up:
        trained_head = "llm/embedding" if plan.model.llm.tied else "llm/head"
        self.head_gradient = 4 * head * (trained_head in trained)
        self.images = self._encoder_bytes(plan, width)

    def _encoder_bytes(self, plan: StagePlan, width: int) -> float:
        """Activations of encoder and connector."""
        grid, vision = plan.model.vision_spec.grid, plan.model.vision
        slots = self.micro_rows * self.slots
        sharing = self.sequence * self.tensor  # chips with the same rows, which divide their images
        images, tokens = math.ceil(slots / sharing) * vision.views, grid[0] * grid[1] + 1
        states = 4 * images * tokens * vision.width  # float32 sums of hidden states
        request = plan.model.make_connector().request()
        held = len(request.hidden) + len(request.means) + len(request.normalized_means)
        block = images * tokens * width * 14 * vision.width
        kept = (
            request.deepest * {"full": 1, "dots": 10, "none": 14}[plan.model.vision_remat]
            if self.encoder
            else 0
        )
        positions, channels = plan.model.vision_spec.fine
        fine = images * tokens * positions * channels * width  # in cells, as one map, and while that is made
        if plan.stage.cache_features:
            return 3.0 * fine
        visual = slots * plan.model.visual_layout.slot.num_tokens * width * plan.model.llm.width
        states = (1 + held) * states + kept * images * tokens * width * vision.width
        return float(states + block + 3 * fine + 4 * visual)


def rows_of(plan: StagePlan) -> int:
    """`B` of a packed stage without its data: rows that hold `batch_size` samples of mean length, one image each.

    A sample has its image's visual tokens (in tiles: those of the largest canvas) and `MEAN_TEXT_TOKENS`.
    """
    stage = plan.stage
    if stage.samples_per_row == 1:
        return stage.batch_size
    slots, rule = stage.image_slots or plan.config.data.image_slots, plan.model.visual_layout
    length = rule.most_tokens + MEAN_TEXT_TOKENS
    held = max(1, min(stage.samples_per_row, slots // rule.most_slots, plan.seq_len // length))
    multiple = math.prod(plan.mesh.shape[axis] for axis in ROWS) * stage.accumulation
    return math.ceil(stage.batch_size / held / multiple) * multiple


def useful_counts(plan: StagePlan) -> dict[str, int | float]:
    """What a step's batch holds, as `StepFlops` counts it: full rows of one sample, or packed samples of mean length.

    A sample that has a row for itself is taken as filling it, a packed one has `MEAN_TEXT_TOKENS`; `MEAN_LABEL_SHARE`
    of the text is supervised.
    """
    samples, rule = plan.stage.batch_size, plan.model.visual_layout
    visual = rule.most_tokens
    length = plan.seq_len if plan.stage.samples_per_row == 1 else visual + MEAN_TEXT_TOKENS
    labels = min(int(MEAN_LABEL_SHARE * max(length - visual, 0)), plan.config.data.label_tokens or length)
    return batch_counts(plan.model, samples, length, labels, rule.most_slots)


def executed_flops(plan: StagePlan, attention: str) -> float:
    """Operations that a step carries out: padding, empty slots and recomputation included."""
    size, flops, rows = _Sizes(plan), plan.flops, plan.rows or plan.stage.batch_size
    full = batch_counts(plan.model, rows, plan.seq_len, size.labels, size.slots)
    if attention == "xla":  # also what the causal rule leaves out
        full["attention_pairs"] = rows * plan.seq_len**2
    forward = {name: flops.forward[name] * full[name] for name in full}
    total = flops({**full, "attention_pairs": 0})
    again = plan.model.remat == "full" and size.backward
    total += forward["tokens"] * (1 - size.last_share) * again
    products = 2 + (2 * (plan.model.remat != "none") + BACKWARD_PRODUCTS[attention]) * size.backward
    total += forward["attention_pairs"] * products / 2
    return total + forward["images"] * (size.encoder and plan.model.vision_remat == "full")


def network_bytes(plan: StagePlan, machine: Machine) -> tuple[float, float]:
    """Bytes that a chip sends over the fast network and between slices in a step, by formula.

    Weights of blocks are gathered over `fsdp` for the forward and the backward pass, those of attention twice for the
    latter if it computes the block again; the head and the tower once. Gradients of what is trained are scattered back
    (the head's in float32) and added up over `data`. `tensor` adds up two activations a block and pass, embeddings,
    and the gradient of what the head reads. `sequence` shares parameters like `fsdp`, and trades queries, keys, values
    and outputs around attention in each pass.
    """
    size, parts, cfg = _Sizes(plan), plan.stage.accumulation, plan.model.llm
    width = jnp.dtype(plan.model.dtype).itemsize
    again = plan.model.remat != "none"
    rebuilt = size.backward and plan.model.remat == "full"
    weights = (1 + size.backward) * size.block_bytes + rebuilt * size.attention_bytes
    gathered = cfg.depth * weights / size.tensor + size.head_bytes + size.tower_bytes
    scattered = size.trained_block_bytes / size.tensor + size.head_gradient
    # XLA for TPUs then adds up whole arrays, from which each chip takes its part.
    if machine.shape and size.fsdp > FEW:
        scattered *= 2
        gathered *= 2 if machine.shape.count("x") == 2 else 1
    across = machine.slices // math.gcd(size.data, machine.slices)  # slices whose chips share parameters
    within = size.fsdp // across
    sent = parts * (gathered + scattered) * (within - 1) / within
    slow = parts * (gathered + scattered) * (across - 1) / size.fsdp
    gradients = 2 * parts * size.chip_gradient_bytes
    inside, outside = size.data * across // machine.slices, machine.slices // across
    sent += gradients * (inside - 1) / inside
    slow += gradients * (outside - 1) / outside
    positions = size.micro_rows * size.length
    passes = 2 + (2 + again) * size.backward
    summed = cfg.depth * passes * positions * width + 4 * (positions + size.micro_rows * size.labels)
    sent += parts * 2 * (size.tensor - 1) / size.tensor * summed * cfg.width
    traded = positions * width * 2 * (cfg.heads + cfg.kv_heads) * cfg.head_width / size.tensor
    passes = 1 + (1 + again) * size.backward
    sent += parts * cfg.depth * passes * traded * (size.sequence - 1) / size.sequence
    return sent, slow


def memory_traffic(plan: StagePlan) -> float:
    """Bytes that a chip reads and writes in its memory in a step at least.

    Weights once a pass and part of the batch, state and gradients read and written by the optimizer, and each block's
    activations written and read once a pass.
    """
    size, parts, cfg = _Sizes(plan), plan.stage.accumulation, plan.model.llm
    width = jnp.dtype(plan.model.dtype).itemsize
    passes = 1 + (1 + (plan.model.remat == "full")) * size.backward
    weights = parts * passes * cfg.depth * size.block_bytes / size.tensor
    state = chip_bytes(plan.state.params) + chip_bytes(plan.state.opt_state)
    inner = 2 * cfg.heads * cfg.head_width + 2 * cfg.kv_heads * cfg.head_width + 3 * cfg.mlp_width
    block = size.micro_rows * size.length * width * (4 * cfg.width + inner / size.tensor)
    return weights + 2 * state + 2 * chip_bytes(plan.state.params) + parts * passes * cfg.depth * 2 * block


def roofline(
    plan: StagePlan, machine: Machine, attention: str, sent: tuple[float, float] | None = None
) -> Roofline:
    """The bound of a step's time on a machine.

    Args:
      sent: bytes over the fast and the slow network, from the compiled program; None takes the formula.
    """
    chip: Chip = machine.chip
    fast, slow = sent or network_bytes(plan, machine)
    return Roofline(
        compute=executed_flops(plan, attention) / (machine.count * chip.flops),
        memory=memory_traffic(plan) / chip.memory_bandwidth,
        network=fast / chip.network,
        slow_network=slow / chip.slow_network,
        model_flops=float(plan.flops(useful_counts(plan))),
        peak=machine.count * chip.flops,
    )


def attention_backend(plan: StagePlan, machine: Machine) -> str:
    """What `model.attention` takes on the machine for the LLM's rows."""
    from mllm_jax.models.attention import choose
    from mllm_jax.models.attention_uses import attention_uses

    use = next(
        use for part, use in attention_uses(plan.model, plan.seq_len).items() if part.startswith("LLM")
    )
    return choose(plan.model.attention, use, "tpu" if machine.shape else "gpu")[0]


def parameters(plan: StagePlan) -> dict[str, int]:
    """How many parameters each part has."""
    return {name: paths.count(tree) for name, tree in mllm.abstract_params(plan.model).items()}
