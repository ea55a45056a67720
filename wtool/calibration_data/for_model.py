"""The windows that a model is to be calibrated on, with the tokenizer that stands beside its weights."""

from wtool.calibration_data.source import CalibrationSource
from wtool.calibration_data.windows import Windows, windows
from wtool.checkpoint import Checkpoint
from wtool.checkpoint.tied import embedding_name
from wtool.errors import MissingInput
from wtool.layer_rules import text_config
from wtool.loading import load_tokenizer
from wtool.recipe_parts import Calibration

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")  # how families name it in config.json


def windows_asked(checkpoint: Checkpoint, asked: Calibration, *, trust_remote_code: bool = False) -> Windows:
    """The windows a recipe asks for.

    raises: InputError, RuntimeProblem
    """
    source = CalibrationSource(
        asked.data, asked.samples, asked.seqlen, asked.seed, text_column=asked.text_column, split=asked.split
    )
    return windows_for(checkpoint, source, trust_remote_code=trust_remote_code)


def windows_for(checkpoint: Checkpoint, source: CalibrationSource, *, trust_remote_code: bool = False) -> Windows:
    """Windows of no more tokens than the model has positions, of tokens that its embedding has rows for.

    raises: InputError, RuntimeProblem
    """
    try:
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    except MissingInput:
        if not source.references:
            raise
        tokenizer = None  # rows of token ids need none
    config = text_config(checkpoint.config)
    embedding = embedding_name(checkpoint.tensors)
    return windows(
        source,
        tokenizer,
        limit=next((config[key] for key in POSITIONS if isinstance(config.get(key), int)), None),
        vocabulary=checkpoint.tensors[embedding].shape[0] if embedding else None,
    )
