"""Layouts of images: what is kept, what is refused, and when the size is read."""

import numpy as np
import pytest

from mllm_jax.data.layout import Slot, VisualLayout, WholeImage


def test_a_whole_image_keeps_all_tokens_of_one_slot_and_reads_no_size():
    rule = WholeImage(Slot(6, size=(28, 42)))
    found = rule(lambda: pytest.fail("read"))
    assert found.slots == (rule.slot,)
    np.testing.assert_array_equal(found.kept, np.arange(6))
    assert (found.num_tokens, found.slot_tokens) == (6, 6)


def test_counts_are_of_what_is_kept():
    found = VisualLayout((Slot(6), Slot(6)), (7, 0, 11))
    assert (found.num_tokens, found.slot_tokens) == (3, 12)


@pytest.mark.parametrize("kept", [(), (12,), (-1, 3)])
def test_tokens_that_are_not_there_are_refused(kept):
    with pytest.raises(ValueError, match="visual token"):
        VisualLayout((Slot(6), Slot(6)), kept)
    with pytest.raises(ValueError, match="at least one visual token, got 0"):
        Slot(0)
