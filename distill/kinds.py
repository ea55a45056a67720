"""Which divergence between teacher and student is meant. Made without torch, so that a recipe can be."""

from dataclasses import dataclass

from wtool.errors import UsageError, did_you_mean

KINDS: dict[str, str] = {
    "forward-kl": "KL(teacher | student): the student covers all that the teacher says",
    "reverse-kl": "KL(student | teacher): the student says only what the teacher says",
    "jsd": "both KL to their mixture: beta 0 is forward-kl, 1 is reverse-kl",
    "skew-kl": "KL(teacher | the student with a share alpha of the teacher)",
    "skew-reverse-kl": "KL(student | the teacher with a share alpha of the student)",
    "tvd": "total variation: half the sum of |difference|; a figure rather than a loss",
    "uld": "the probabilities in falling order compared, whatever their tokens: for two tokenizers",
}


@dataclass(frozen=True)
class Divergence:
    """A divergence between teacher and student, with its parameters.

    kind:        one of KINDS
    temperature: both logits are divided by it and the value is multiplied by its square, above 0
    beta:        of jsd, the teacher's share of the mixture, in [0, 1]
    alpha:       of the skew divergences, the share of the first distribution in what it is compared with, in [0, 1)

    raises: UsageError
    """

    kind: str = "forward-kl"
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"loss '{self.kind}' is not one of {', '.join(KINDS)}{did_you_mean(self.kind, KINDS)}")
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature {self.temperature}: a number above 0 is needed")
        if not 0 <= self.beta <= 1:
            raise UsageError(f"beta {self.beta}: a share in [0, 1] is needed")
        if not 0 <= self.alpha < 1:
            raise UsageError(f"alpha {self.alpha}: a share in [0, 1) is needed")
