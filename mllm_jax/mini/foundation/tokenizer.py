"""The mini LLM's tokenizer: byte-level BPE, so that any text can be written, trained on the mini world's words."""

import pathlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mllm_jax.data.conversations import render
from mllm_jax.mini.foundation.notes import turns_of
from mllm_jax.mini.world import text_sample

# Frequent English words, so that questions and captions about other images stay short.
COMMON_WORDS = """
the of and to in is it that for on with as was at by an be this from or are not but what all were when we there can
your which their if will each about how up out them then she many some so these would other into has more two like him
see time could no make than first been its who now people my made over did down only way find use may water long little
very after words called just where most know get through back much before go good new write our me man too any day same
right look think also around another came come work three must because does part even place well such here take why
things help put years different away again off went old number great tell men say small every found still between name
should home big give air line set own under read last never us left end along while might next sound below saw
something thought both few those always looked show large often together asked house world going want school important
until form food keep children feet land side without boy once animals life enough took four head above kind began almost
live page got earth need far hand high year mother light country father let night picture being study second soon story
since white ever paper hard near sentence better best across during today however sure means knew it's try told young
sun thing whole hear example heard several change answer room sea against top turned learn point city play toward five
himself usually money seen didn't car morning body upon family later turn move face door cut done group true half red
fish plants black short run book gave order open ground cold really table remember tree course front space inside ago
sad early woman person dog cat horse bird bus train street sitting standing holding riding walking plate bowl pizza
chair couch bed computer phone laptop kitchen bathroom window wall clock sign grass field snow beach ocean boat plane
sky truck bike motorcycle skateboard surfboard tennis baseball ball shirt hat green blue yellow brown gray orange pink
purple teal shape image photo contain present circle square triangle rectangle yes color wearing next couple women
""".split()


def corpus(samples: int, seed: int):
    """Yields mini-world conversations as the LLM will read them, and the common words."""
    for index in range(samples):
        turns = turns_of(text_sample(seed, index))
        yield "".join(span.text for span in render("mini", turns) if not span.special)
    for _ in range(max(samples // 200, 1)):
        yield " " + " ".join(COMMON_WORDS)


def train_tokenizer(vocab: int, samples: int, seed: int, directory: pathlib.Path) -> PreTrainedTokenizerFast:
    """Trains and saves the tokenizer (`tokenizer.json`, `tokenizer_config.json`) in `directory`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(samples, seed), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(directory)
    return fast
