"""Names of parameters: as wrappers of a model leave them, and as the unwrapped model has them."""

from __future__ import annotations

from fnmatch import fnmatchcase

# What wrappers put into names: DDP in front, torch.compile, activation checkpointing and flattening engines anywhere.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def plain_name(name: str) -> str:
    """The name of a parameter in the unwrapped model."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def matches(name: str, pattern: str) -> bool:
    """Whether a shell-style pattern fits a name, as it is or in the unwrapped model."""
    return fnmatchcase(name, pattern) or fnmatchcase(plain_name(name), pattern)
