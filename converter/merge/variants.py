"""What an adapter's config says of the kinds of LoRA: DoRA, biases, blocks, trained tokens, experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from converter.errors import BadAdapter, Unsupported

_UNDERSTOOD = """
    use_dora lora_bias use_bdlora trainable_token_indices ensure_weight_tying target_parameters velora_config
    monteclora_config lora_B_layout
"""
UNDERSTOOD = frozenset(_UNDERSTOOD.split())
"""Options that are read here, or change nothing once the training is over."""
_EXCLUSIVE = ("use_dora", "use_bdlora", "velora_config", "monteclora_config")
_LAYOUTS = {"rank_major": False, "grouped_by_expert": True}


class Diagonal(NamedTuple):
    """Which factor is stored as the blocks on its diagonal, and how many they are."""

    factor: str
    """A or B. Neither: the factors are whole, but PEFT rounds their delta as it does that of blocks."""
    blocks: int


class Variants:
    """The options of one adapter's config; `where` names its file in messages. Raises `BadAdapter`, `Unsupported`."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._where = where
        together = [key for key in _EXCLUSIVE if config.get(key)]
        if len(together) > 1:
            raise Unsupported(f"{where}: {' and '.join(together)}, which PEFT does not combine")
        self.uses_dora = self._flag(config, "use_dora")
        self.has_lora_bias = self._flag(config, "lora_bias")
        self.keeps_ties = self._flag(config, "ensure_weight_tying")
        """Whether embedding and head, which the base ties, were trained as one."""
        self.parameters = self._names(config.get("target_parameters"), "target_parameters")
        """Parameters that are no module's `weight`, or ends of their names: the experts of a layer."""
        layout = config.get("lora_B_layout")
        if layout is not None and layout not in _LAYOUTS:
            raise Unsupported(f"{where}: lora_B_layout {str(layout)[:60]!r}, expected {' or '.join(_LAYOUTS)}")
        self.grouped = None if layout is None else _LAYOUTS[layout]
        """Whether lora_B of experts is grouped by expert; None: the config doesn't say."""
        version = config.get("peft_version")
        self.peft_version = version if isinstance(version, str) else None
        alone = config.get("peft_type") == "TRAINABLE_TOKENS"
        self._tokens_option = "token_indices" if alone else "trainable_token_indices"
        self._tokens = config.get(self._tokens_option)
        blocks = config.get("use_bdlora") or None
        if blocks is not None and not isinstance(blocks, Mapping):
            raise BadAdapter(f"{where}: use_bdlora is not a mapping")
        self._rounds_delta = config.get("init_lora_weights") == "mica"
        self._blocks: Mapping[str, Any] | None = blocks
        if blocks is not None and (type(blocks.get("nblocks")) is not int or blocks["nblocks"] < 1):
            raise BadAdapter(f"{where}: use_bdlora's nblocks is {blocks.get('nblocks')!r}, expected a positive integer")
        self._block_names = {
            factor: self._names((blocks or {}).get(f"target_modules_bd_{factor.lower()}"), "use_bdlora")
            for factor in ("A", "B")
        }

    def names(self, parameter: str) -> bool:
        """Whether target_parameters has a parameter, or an end of its name."""
        return any(f".{parameter}".endswith(f".{name}") for name in self.parameters)

    def diagonal(self, module: str) -> Diagonal | None:
        """Which factor of a module is stored as blocks; None: the adapter is of another kind.

        A name applies to a module whose own name has it in it: `peft.tuners.lora.variants.BdLoraLinearVariant.init`.
        """
        if self._blocks is None:
            return Diagonal("", 1) if self._rounds_delta else None
        own = module.rpartition(".")[2]
        factors = [factor for factor, names in self._block_names.items() if any(name in own for name in names)]
        if len(factors) > 1:
            raise BadAdapter(f"{self._where}: use_bdlora names {module} for both A and B")
        return Diagonal(factors[0] if factors else "", self._blocks["nblocks"] if factors else 1)

    def tokens(self, module: str) -> tuple[int, ...]:
        """The numbers of the tokens of an embedding whose rows were trained.

        A list is of the input embedding; a mapping names modules by the ends of their paths.
        """
        value, where = self._tokens, f"{self._where}: {self._tokens_option}"
        if isinstance(value, Mapping):
            named = [tokens for name, tokens in value.items() if f".{module}".endswith(f".{name}")]
            if len(named) != 1:
                raise BadAdapter(f"{where} names {module} {len(named)} times, and the file has trained tokens for it")
            value = named[0]
        if not isinstance(value, list) or not value or not all(type(token) is int and token >= 0 for token in value):
            raise BadAdapter(f"{where} has no list of tokens for {module}")
        if len(set(value)) < len(value):
            raise BadAdapter(f"{where} has a token twice for {module}")
        return tuple(value)

    def _flag(self, config: Mapping[str, Any], key: str) -> bool:
        value = config.get(key) or False
        if value not in (True, False):
            raise BadAdapter(f"{self._where}: {key} {str(value)[:60]!r}, expected true or false")
        return bool(value)

    def _names(self, value: object, key: str) -> tuple[str, ...]:
        names = value or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadAdapter(f"{self._where}: {key} is not a list of names")
        return tuple(names)
