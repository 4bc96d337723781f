"""From requests to batches of static shape, with what prompts share about an image kept apart.

Benchmarks ask about the same image many times (circular evaluation: once per option and more). Every prompt is
therefore cut behind its last visual token: the *prefix* (template, images) and the *suffix* (the question).
Equal prefixes are computed once; suffixes are padded on the right to one of a few lengths.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from mllm_jax.data.batch import SELECT, Batch, Size
from mllm_jax.data.conversations import SampleError
from mllm_jax.data.layout import Slot
from mllm_jax.data.tokens import EncodedSample, slot_grids

DEFAULT_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512)
_PREFIX_STEP = 8  # prefixes are padded to a multiple of this


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One prompt.

    Attributes:
      id: for messages, and the number from which random draws are made.
      prompt: from `tokens.encode_prompt`; for likelihoods from `tokens.encode_sample`, whose weights mark
        the answer.
      images: a key for each image, in order; equal keys are the same image. The image itself is
        given by the `load_image` function that goes with the requests.
    """

    id: str
    prompt: EncodedSample
    images: tuple[Hashable, ...] = ()

    def check(self, slot: Slot) -> None:
        """Raises SampleError if the prompt's visual tokens are not those of its images in a model of this slot."""
        layouts = self.prompt.layouts
        if len(layouts) != len(self.images) or any(
            each != slot for layout in layouts for each in layout.slots
        ):
            found = [layout.num_tokens for layout in layouts]
            raise SampleError(
                self.id,
                f"the prompt holds images of {found} visual tokens; the request has {len(self.images)} image(s) and "
                f"the model makes {slot.num_tokens} tokens of each image slot",
            )

    @property
    def cut(self) -> int:
        """Where the suffix begins: behind the last visual token, but before the last token to be read."""
        visual = np.flatnonzero(self.prompt.image_of >= 0)
        if not len(visual):
            return 0
        answer = np.flatnonzero(self.prompt.loss_weights)
        end = int(answer[0]) if len(answer) else len(self.prompt)
        return min(int(visual[-1]) + 1, end - 1)

    @property
    def prefix_key(self) -> Hashable:
        """Equal for requests whose prefixes are the same computation."""
        cut = self.cut
        prompt = self.prompt
        return self.images, prompt.tokens[:cut].tobytes(), prompt.image_of[:cut].tobytes()


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """Requests that are answered together.

    Attributes:
      requests: in the order in which they came.
      prefixes: one request for each different prefix.
      prefix_of: index into `prefixes`, per request.
    """

    requests: list[Request]
    prefixes: list[Request]
    prefix_of: Int32[np.ndarray, " R"]

    @property
    def prefix_length(self) -> int:
        """Length to which all prefixes are padded; 0 if no request has an image."""
        longest = max(request.cut for request in self.prefixes)
        return -(-longest // _PREFIX_STEP) * _PREFIX_STEP

    def image_slots(self, most: int) -> int:
        """Image slots of every prefix: a power of two, so that there are few programs; 0 if no request has an image.

        Args:
          most: slots of the largest image, which are not exceeded where they are enough.
        """
        needed = max(request.prompt.num_slots for request in self.prefixes)
        slots = 1 << (needed - 1).bit_length() if needed else 0
        return min(slots, most) if needed <= most else slots

    def suffix_batches(
        self, batch_size: int, buckets: Sequence[int]
    ) -> Iterator[tuple[Int32[np.ndarray, " n"], Batch]]:
        """Yields which requests and their suffixes; shorter ones come first, so that little is padded."""
        lengths = np.asarray([len(r.prompt) - r.cut for r in self.requests])
        order = np.argsort(lengths, kind="stable").astype(np.int32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            requests = [self.requests[i] for i in chosen]
            length = bucket(int(lengths[chosen[-1]]), buckets)
            yield chosen, lay_out([(r.prompt, r.cut, len(r.prompt)) for r in requests], length, batch_size)


def chunks(requests: Iterable[Request], max_requests: int, max_prefixes: int) -> Iterator[Chunk]:
    """Cuts a stream of requests into chunks that are limited in requests and in different prefixes."""
    taken: list[Request] = []
    prefix_of: list[int] = []
    prefixes: dict[Hashable, tuple[int, Request]] = {}

    def chunk() -> Chunk:
        return Chunk(taken, [request for _, request in prefixes.values()], np.asarray(prefix_of, np.int32))

    for request in requests:
        key = request.prefix_key
        if taken and (len(taken) == max_requests or (key not in prefixes and len(prefixes) == max_prefixes)):
            yield chunk()
            taken, prefix_of, prefixes = [], [], {}
        prefixes.setdefault(key, (len(prefixes), request))
        taken.append(request)
        prefix_of.append(prefixes[key][0])
    if taken:
        yield chunk()


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length`; beyond the largest, the next power of two."""
    return min((b for b in buckets if b >= length), default=1 << (length - 1).bit_length())


def lay_out(pieces: Sequence[tuple[EncodedSample, int, int]], length: int, batch_size: int) -> Batch:
    """`(prompt, start, stop)` pieces as rows of `length` tokens, with empty rows up to `batch_size`."""
    combination = next((of for prompt, _, _ in pieces if (of := prompt.combination) != SELECT), SELECT)
    rows = Batch.spec(batch_size, length=length, labels=False, combination=combination).empty()
    for row, (prompt, start, stop) in enumerate(pieces):
        here = slice(0, stop - start)
        rows.tokens[row, here] = prompt.tokens[start:stop]
        rows.positions[row, here] = np.arange(start, stop)
        rows.segment_ids[row, here] = 1
        for name in ("visual_index", "visual_taps", "visual_weights"):
            if (values := getattr(prompt, name)) is not None:
                getattr(rows, name)[row, here] = values[start:stop]
    return rows


def with_images(
    rows: Batch,
    prompts: Sequence[EncodedSample],
    images: Sequence[Sequence[UInt8[np.ndarray, "_ H W 3"]]],
    slots: int,
    slot: Slot,
) -> Batch:
    """Rows with `slots` image slots each.

    Args:
      prompts: of the first rows.
      images: their images, each as its slots.
      slot: of the model.
    """
    count = len(rows.tokens)
    stacked, mask = stack_images(images, count, slots, slot.size)
    rows = rows.replace(images=stacked, image_mask=mask)
    if not slot.native:
        return rows
    grids = np.zeros((count, slots, 2), np.int32)  # rows and columns of patches of every slot
    for row, prompt in enumerate(prompts):
        grids[row, : prompt.num_slots] = slot_grids(prompt)
    return rows.replace(grids=grids)


def stack_images(
    images: Sequence[Sequence[UInt8[np.ndarray, "_ H W 3"]]], batch_size: int, slots: int, size: Size
) -> tuple[UInt8[np.ndarray, "B I H W 3"], Bool[np.ndarray, "B I"]]:
    """The pixels of a batch and the mask of slots in use, from the slots of each row's images."""
    stacked = np.zeros((batch_size, slots, *size, 3), np.uint8)
    mask = np.zeros((batch_size, slots), bool)
    for row, own in enumerate(images):
        filled = np.concatenate(own) if own else stacked[row, :0]
        stacked[row, : len(filled)] = filled
        mask[row, : len(filled)] = True
    return stacked, mask
