"""What is asked about a meme: a question with two answers, in words that a person wrote."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_core.config import Config
from fusion_core.errors import ConfigError

DEFINITION = (
    "content that attacks, degrades or threatens a person, group, organisation or society, spreads dangerous "
    "falsehoods, or encourages such acts, whether said openly or implied by the combination of picture and "
    "words; criticism, satire of the powerful and crude humour alone are not enough."
)
_ALWAYS_BANNED = ("hateful", "offensive", "policy", "label")


@dataclass(frozen=True)
class Policy(Config):
    """A policy that a meme falls under or not; ``Policy()`` is the paper's question.

    Args:
        name: short, for prompts and reports.
        definition: what falls under it.
        positive: the word for a meme that does (class 1).
        negative: the word for one that does not (class 0).

    Raises:
        ConfigError: an empty field, or the same word for both.

    Example:
        >>> Policy("spam", "unasked advertising.", "spam", "wanted").digest()[:8]
        '4822ce33'
    """

    name: str = "harmful"
    definition: str = DEFINITION
    positive: str = "harmful"
    negative: str = "harmless"

    def __post_init__(self) -> None:
        for field in ("name", "definition", "positive", "negative"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(f"policy: {field} is {value!r}, wanted text that is not empty")
        if self.positive.strip().lower() == self.negative.strip().lower():
            raise ConfigError(
                f"policy: positive and negative are both {self.positive!r}, wanted two different words"
            )

    @property
    def banned(self) -> tuple[str, ...]:
        """Words that a debater is told not to use."""
        return tuple(dict.fromkeys((self.positive, self.negative, *_ALWAYS_BANNED)))

    def digest(self) -> str:
        """Sha256 of the four fields, hexadecimal: two policies with one digest ask the same."""
        from fusion_core.checkpoint import digest

        return digest([self.name, self.definition, self.positive, self.negative])
