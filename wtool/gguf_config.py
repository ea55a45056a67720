"""config.json with nothing left out: transformers does not write what equals the default of its class."""

from typing import Any

from transformers import AutoConfig

from wtool.checkpoint import Checkpoint
from wtool.loading import explained, quiet


def full_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """All settings of a checkpoint's model.

    raises: InputError where transformers cannot read them
    """
    given = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    with explained(checkpoint.label, "read its configuration"), quiet():
        return AutoConfig.for_model(given.pop("model_type"), **given).to_dict()
