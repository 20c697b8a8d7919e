"""A byte-level BPE tokenizer trained in memory: small, fast, offline, and able to spell any text.

Two kinds, because the two go wrong in different ways:

* ``bos=False`` is GPT-2's: one token ``<|endoftext|>`` is BOS, EOS and padding at once, encoding
  adds nothing, and a token's offsets include the space before the word;
* ``bos=True`` is Llama 3's: three different tokens, encoding itself prepends BOS, and offsets leave
  that space out (transformers 5 keeps it in ``model.tokenizer``, which TransformerLens reloads).
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCAB_SIZE = 440

TEXT = """\
The Eiffel Tower is located in the city of Paris. The Space Needle is located in Seattle.
The Colosseum is in the city of Rome. The Space Needle is in downtown Seattle. Paris is in France.
The mother tongue of Danielle Darrieux is French. The mother tongue of Angela Merkel is German.
The mother tongue of Leonardo DiCaprio is English. The native language of an Englishman is
English, and the language of the capital of France is French. Rome is the capital of Italy.
LeBron James plays the sport of basketball. Lionel Messi plays the sport of football. Babe Ruth
plays baseball. The sport that LeBron James plays is basketball; he is a professional athlete.
The iPhone was developed by Apple. Windows was developed by Microsoft. The Mac was created by Apple.
Steve Jobs was the founder of Apple, and Bill Gates was the founder of Microsoft in Seattle.
Vinson Massif is a mountain in Antarctica. Mount Everest is a mountain in Asia, as everyone knows.
My favourite colour is blue, she said to the old man. It was the best of times, and the worst.
The city was named for the river. The house was on the hill, and the tower was in the old city.
He said that the capital of Germany is Berlin, and that the capital of England is London.
Berlin, London, Paris, Rome and Seattle are the names of cities. What is the name of the city?
"""


def tiny_tokenizer(folder: str | Path, *, bos: bool) -> PreTrainedTokenizerBase:
    """Train the tokenizer, save it to ``folder`` and reload it from there.

    TransformerLens reloads a model's tokenizer from ``name_or_path``, which only a tokenizer that
    came from a folder has; hence the detour over the disk. Training is deterministic.

    Args:
        folder: a folder to write to, for instance pytest's ``tmp_path``.
        bos: whether encoding prepends BOS (see the module docstring).
    """
    names = ("<pad>", "<bos>", "<eos>") if bos else ("<|endoftext|>",) * 3
    bpe = _train(specials=tuple(dict.fromkeys(names)))
    bpe.post_processor = processors.ByteLevel(trim_offsets=bos)
    if bos:
        template = processors.TemplateProcessing(
            single="<bos> $A",
            pair="<bos> $A <bos> $B",
            special_tokens=[("<bos>", bpe.token_to_id("<bos>"))],
        )
        bpe.post_processor = processors.Sequence([bpe.post_processor, template])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=names[0],
        bos_token=names[1],
        eos_token=names[2],
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    ).save_pretrained(str(folder))
    return AutoTokenizer.from_pretrained(str(folder))


def _train(*, specials: tuple[str, ...]) -> Tokenizer:
    """Byte-level BPE on ``TEXT``; all 256 bytes are in the alphabet, so nothing is ever unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT.splitlines(), trainer)
    return bpe
