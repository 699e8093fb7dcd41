"""An adapter's config: which options are understood, and what they say of a module.

Every rule is PEFT's own, down to what a pattern matches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from converter.errors import AdapterMismatch, BadAdapter, Unsupported
from converter.merge.patterns import SECONDS, Pattern, Patterns
from converter.merge.reasons import METHODS, OPTIONS, other_trainer
from converter.merge.variants import UNDERSTOOD as _OF_VARIANTS
from converter.merge.variants import Variants

# What a saved LoraConfig may say without changing the merge, and what is read below.
_WITHOUT_EFFECT = """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout
    megatron_core runtime_config qalora_group_size merge_weights
    eva_config loftq_config corda_config lora_ga_config
"""
"""The last line has the configs of initialisations. PEFT reads such a config only if init_lora_weights names its
initialisation. PEFT before 0.4 wrote merge_weights, which was about training."""
_READ = """
    r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform
    layers_pattern fan_in_fan_out bias modules_to_save init_lora_weights kasa_config
"""
UNDERSTOOD = frozenset(_WITHOUT_EFFECT.split() + _READ.split()) | _OF_VARIANTS
"""Options of a LoraConfig that may have any value that PEFT gives a meaning."""
# Initialisations that leave the base as it was; most others change the base that the adapter was trained on.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_CHANGE_THE_BASE = ("loftq_config", "corda_config", "lora_ga_config")
"""Configs of initialisations that change the base. If one is left over, the user may have saved the changed base."""
_OF_THE_BASE = ("pissa", "olora")
"""Initialisations that take a part out of the base, which can be found again."""
TUNERS = {
    "ADALORA": "lora_", "BEFT": "beft_", "BOFT": "boft_", "C3A": "c3a_", "DEFT": "deft_", "DELORA": "delora_",
    "FOURIERFT": "fourierft_", "GLORA": "glora_", "GRALORA": "gralora_", "HIRA": "hira_", "HRA": "hra_", "IA3": "ia3_",
    "LOHA": "hada_", "LOKR": "lokr_", "MISS": "miss_", "OFT": "oft_", "OSF": "osf_", "PEANUT": "peanut_",
    "PSOFT": "psoft_", "PVERA": "pvera_", "RANDLORA": "randlora_", "ROAD": "road_", "SHIRA": "shira_",
    "SUPERTUNING": "supertuning_", "VBLORA": "vblora_", "VERA": "vera_", "WAVEFT": "waveft_",
}  # fmt: skip
"""Tuners that PEFT merges one module at a time → with what the names of their tensors begin."""
REPLACING = {
    "LN_TUNING": frozenset(["target_modules", "exclude_modules", "modules_to_save"]),
    "TRAINABLE_TOKENS": frozenset(["target_modules", "token_indices", "init_weights"]),
}
"""Tuners that put whole tensors or rows in the place of the base's → their options."""
_LARGEST = float(2**128 - 2**104)
"""What float32 holds, in which deltas are computed."""
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


class Options:
    """What an adapter's config says. Opening it refuses what is not understood.

    `where` names the file in messages; `seconds` is the time for matching patterns. Raises `BadAdapter` for options
    that contradict themselves, `Unsupported` for those that change the merge in ways that this tool does not reproduce.
    """

    def __init__(self, config: Mapping[str, Any], where: str, seconds: float = SECONDS) -> None:
        self._config = config
        self._where = where
        self._lists: dict[str, frozenset[Any]] = {}
        self._check()
        self.variants = Variants(config, where)
        self._saved = [Pattern("modules_to_save", name, _around(name)) for name in self._strings("modules_to_save")]
        self._whole = {
            key: Pattern(key, value, value, whole=True)
            for key in ("target_modules", "exclude_modules")
            if isinstance(value := config.get(key), str)
        }
        self._layers = [
            Pattern("layers_pattern", name, _layer_after(name)) for name in as_list(config.get("layers_pattern"))
        ] or [Pattern("layers_pattern", "", _ANY_LAYER)]
        self._values = {
            key: {Pattern(key, name, _at_the_end(name)): value for name, value in (config.get(key) or {}).items()}
            for key in ("rank_pattern", "alpha_pattern")
        }
        valued = [pattern for values in self._values.values() for pattern in values]
        self._patterns = Patterns(where, [*self._whole.values(), *self._saved, *self._layers, *valued], seconds)

    @property
    def is_bridged(self) -> bool:
        """Whether PEFT's own classes merge it: other tuners, and LoRA that changes the base."""
        of_base = self._config.get("init_lora_weights") in _OF_THE_BASE or bool(self._config.get("kasa_config"))
        return self._config.get("peft_type") in TUNERS or of_base

    @property
    def notes(self) -> list[str]:
        """What a user should know of options that change nothing here."""
        return [
            f"{self._where}: {key} is given, but init_lora_weights is another: if the adapter was trained on a base "
            "that this initialisation had changed and that was saved, give that base"
            for key in _CHANGE_THE_BASE
            if self._config.get(key)
        ]

    @property
    def prefix(self) -> str | None:
        """With what the names of the parts of a module begin; None: LoRA's."""
        return TUNERS.get(str(self._config.get("peft_type")))

    @property
    def replaces_by(self) -> str:
        """The option that names what the adapter has whole."""
        return "target_modules" if self._config.get("peft_type") == "LN_TUNING" else "modules_to_save"

    @property
    def has_scaling(self) -> bool:
        """Whether what it adds is scaled by alpha and rank."""
        return self._config.get("peft_type") == "LORA" and not self.is_bridged

    def learn(self, modules: Iterable[str]) -> None:
        """Match all patterns against modules that will be asked for, which is faster than one by one."""
        self._patterns.learn(modules)

    @property
    def names_targets(self) -> bool:
        """Whether target_modules is given; PEFT would guess it by the architecture, in each version otherwise."""
        return self._config.get("target_modules") is not None

    @property
    def trains_biases(self) -> bool:
        return self._config.get("bias") not in (None, False, "none")

    @property
    def saved(self) -> tuple[str, ...]:
        """What `modules_to_save` names."""
        return tuple(pattern.written for pattern in self._saved)

    def is_saved_whole(self, module: str) -> bool:
        """Whether `modules_to_save` names the module, one around it, or the end of its name.

        PEFT wraps every module whose path ends with the name, without regard to dots: `norm` means input_layernorm,
        too (`peft.utils.other._set_trainable`).
        """
        if self._config.get("peft_type") == "LN_TUNING" and self.targets(module):
            return True
        return self._excluded(module) or any(module.endswith(pattern.written) for pattern in self._saved)

    def targets(self, module: str) -> bool:
        """Whether the config's targeting names the module; PEFT's rules, `exclude_modules` and layer lists included.

        `peft.tuners.tuners_utils.check_target_module_exists`
        """
        if self._excluded(module) or self._names("exclude_modules", module):
            return False
        target = self._config.get("target_modules")
        if isinstance(target, str) and target.lower() == "all-linear":
            return True  # resolved by what the modules are; that the file has their tensors is what says it here
        if not self._names("target_modules", module):
            return False
        layers = self._config.get("layers_to_transform")
        if layers in (None, [], "") or isinstance(target, str) or module in self._listed("target_modules"):
            return True
        matching = (pattern for pattern in self._layers if self._patterns.match(pattern, module))
        first = next(matching, None)
        index = None if first is None else self._patterns.index(first, module)
        return index is not None and int(index) in self._listed("layers_to_transform")

    def scaling(self, module: str, others: Iterable[str] = ()) -> tuple[int, float]:
        """Rank and scaling that the config gives a module: alpha / r, or alpha / sqrt(r) with rsLoRA.

        `r` and `alpha` may be overridden by the first matching pattern, as in `peft.utils.get_pattern_key`. `others`
        are further names of the module; `AdapterMismatch` if patterns that don't know the first name know those.
        """
        own = self._scaling(module)
        if not any(self._patterns.match(pattern, module) for values in self._values.values() for pattern in values):
            names = [module, *(other for other in others if other != module)]
            if any(self._scaling(other) != own for other in names):
                raise AdapterMismatch(
                    f"{module}: rank_pattern or alpha_pattern differ between its names {sorted(names)}"
                )
        return own

    def _scaling(self, module: str) -> tuple[int, float]:
        rank = self._by_pattern("rank_pattern", module, self._config.get("r"))
        alpha = self._by_pattern("alpha_pattern", module, self._config.get("lora_alpha"))
        if type(rank) is not int or not 1 <= rank < 1 << 31:
            raise BadAdapter(f"{self._where}: rank {rank!r} for {module}, expected a positive integer")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST:
            raise BadAdapter(
                f"{self._where}: lora_alpha {str(alpha)[:60]!r} for {module}, expected a number that float32 can hold"
            )
        return rank, alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank

    def _check(self) -> None:
        config, where = self._config, self._where
        if (trainer := other_trainer(config)) is not None:
            raise Unsupported(f"{where}: {trainer}")
        kind = str(config.get("peft_type"))
        if kind in METHODS:
            raise Unsupported(f"{where}: {kind} {METHODS[kind]}")
        if kind != "LORA" and kind not in TUNERS and kind not in REPLACING:
            raise Unsupported(
                f"{where}: peft_type {config.get('peft_type')!r}; this tool merges LORA and what PEFT merges one "
                "module at a time"
            )
        self._check_names()
        if kind in TUNERS:
            return  # PEFT's own class knows its options
        if kind in REPLACING:
            self._refuse_unknown(frozenset(_WITHOUT_EFFECT.split()) | REPLACING[kind])
            return
        init = config.get("init_lora_weights", True)
        if init not in (*_PLAIN_INITIALISATIONS, *_OF_THE_BASE):
            raise Unsupported(
                f"{where}: init_lora_weights {init!r} may change the base that the adapter was trained on; convert the "
                "adapter to plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        self._refuse_unknown(UNDERSTOOD)
        bias = config.get("bias", "none")
        if bias not in ("none", "all", "lora_only"):
            raise BadAdapter(f"{where}: bias {bias!r}, expected none, all or lora_only")
        if not isinstance(config.get("use_rslora", False), bool | None):
            raise BadAdapter(f"{where}: use_rslora {config['use_rslora']!r}, expected true or false")

    def _refuse_unknown(self, understood: frozenset[str]) -> None:
        for key, value in self._config.items():
            if key in understood or value in (None, False, 0) or value in ({}, [], ""):
                continue
            if key in OPTIONS:
                raise Unsupported(f"{self._where}: {key}: {OPTIONS[key]}")
            raise Unsupported(f"{self._where}: {key} = {str(value)[:60]!r} is not an option that this tool understands")

    def _check_names(self) -> None:
        """The options that name modules or layers."""
        config, where = self._config, self._where
        for key in ("target_modules", "exclude_modules"):
            if not isinstance(config.get(key), str):
                self._strings(key)
        layers = config.get("layers_to_transform")
        if layers is not None and not all(type(layer) is int for layer in as_list(layers)):
            raise BadAdapter(f"{where}: layers_to_transform is not a list of numbers")
        if not all(isinstance(pattern, str) for pattern in as_list(config.get("layers_pattern"))):
            raise BadAdapter(f"{where}: layers_pattern is not a list of names")
        for key in ("rank_pattern", "alpha_pattern"):
            if not isinstance(config.get(key) or {}, Mapping):
                raise BadAdapter(f"{where}: {key} is not a mapping")

    def _excluded(self, module: str) -> bool:
        return any(self._patterns.match(pattern, module) for pattern in self._saved)

    def _names(self, key: str, module: str) -> bool:
        """Whether an expression is all of the module's path, or a list has it or an end of it."""
        if key in self._whole:
            return self._patterns.match(self._whole[key], module)
        parts = module.split(".")
        return any(".".join(parts[start:]) in self._listed(key) for start in range(len(parts)))

    def _listed(self, key: str) -> frozenset[Any]:
        """The names or numbers of a list, which may be long, for looking up; a number is a list of one."""
        if key not in self._lists:
            value = self._config.get(key)
            self._lists[key] = frozenset(as_list(value) if isinstance(value, list | int) else ())
        return self._lists[key]

    def _by_pattern(self, key: str, module: str, default: object) -> object:
        matching = (value for pattern, value in self._values[key].items() if self._patterns.match(pattern, module))
        return next(matching, default)

    def _strings(self, key: str) -> list[str]:
        value = self._config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BadAdapter(f"{self._where}: {key} is not a list of names")
        return value


def as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None or value == "" else [value]


def _at_the_end(pattern: str) -> str:
    """What `peft.utils.other.get_pattern_key` makes of a key of rank_pattern."""
    return rf"(.*\.)?({pattern})$"


def _around(name: str) -> str:
    """What `peft.tuners.tuners_utils.check_target_module_exists` makes of a name in modules_to_save."""
    return rf"(^|.*\.){name}($|\..*)"


def _layer_after(pattern: str) -> str:
    """What `peft.tuners.tuners_utils.check_target_module_exists` makes of a layers_pattern."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
