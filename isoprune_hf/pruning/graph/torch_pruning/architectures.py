"""The builds of attention and patch merging that the torch-pruning engine supports, recognised by their parts.

`find_attention` and `find_patch_merging` are the only code of the package that depends on particular architectures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature

from torch import nn
from transformers import PreTrainedModel

from isoprune_hf.errors import UnsupportedArchitectureError


@dataclass(frozen=True)
class Attention:
    """The parts of a multi-head attention; names are relative to the model.

    Args:
        path: The attention module, which has the attribute `num_heads` or similar.
        num_heads: Heads of keys and values, which are the heads that can be pruned.
        head_dim: Dims of a head.
        queries_per_head: Query heads that share one head of keys and values; 1 without grouped queries.
        projections: The linear layers that compute queries, keys and values, in the order of execution.
        stacked: How many of queries, keys and values each linear layer computes: 3 if they are fused, else 1.
        output: The linear layer that reads the heads.
        tables: Parameters with one column per head in dim 1, such as relative-position biases.
        returns_tuple: The module returns (output, weights), as in transformers.
        written: Names of the parameters of `output`: weight, and bias if it has one.
    """

    path: str
    num_heads: int
    head_dim: int
    queries_per_head: int
    projections: tuple[str, ...]
    stacked: int
    output: str
    tables: tuple[str, ...]
    returns_tuple: bool
    written: tuple[str, ...]


@dataclass(frozen=True)
class PatchMerging:
    """The parts of a patch merging: a norm over four patches, which repeat every channel, then a linear layer.

    Args:
        path: The patch-merging module.
        norm: Its norm over 4 x channels.
        reduction: Its linear layer from 4 x channels.
        written: Names of the parameters of `reduction`: weight, and bias if it has one.
    """

    path: str
    norm: str
    reduction: str
    written: tuple[str, ...]


# Attributes with the numbers of heads of an attention module in timm and in transformers.
_QUERY_HEAD_COUNTS = ("num_heads", "num_attention_heads")
_KEY_HEAD_COUNTS = ("num_kv_heads", "num_key_value_heads")
_PROJECTIONS = (("qkv",), ("q_proj", "k_proj", "v_proj"))
_OUTPUTS = ("proj", "o_proj")


def find_attention(model: nn.Module) -> Iterator[Attention]:
    """Yield every multi-head attention of the model.

    Raises:
        UnsupportedArchitectureError: An attention has an unknown build, so a cut could break it.
    """
    known: list[str] = []
    returns_tuple = isinstance(model, PreTrainedModel)  # (output, weights) throughout transformers
    for path, module in model.named_modules():
        spec = _read_attention(path, module, returns_tuple=returns_tuple)
        if spec is not None:
            known.append(path + ".")
            yield spec
        elif _is_attention(module) and not path.startswith(tuple(known)):
            raise UnsupportedArchitectureError(
                f"{path} ({type(module).__name__}): the torch-pruning engine does not support this build of "
                "attention; it supports fused or separate projections of queries, keys and values without norms or "
                "rotary positions inside, as in ViT, DeiT and Swin. Use prune.engine: axes"
            )


def _is_attention(module: nn.Module) -> bool:
    """Check whether a module with parameters is an attention by the name of its class."""
    name = type(module).__name__.lower()
    return ("attention" in name or name.endswith("attn")) and any(True for _ in module.parameters())


def _read_attention(path: str, module: nn.Module, *, returns_tuple: bool) -> Attention | None:
    """Return the parts of an attention, or None if its build is not supported."""
    queries = _first_int(module, _QUERY_HEAD_COUNTS)
    linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    names = next((names for names in _PROJECTIONS if all(name in linears for name in names)), None)
    output = next((name for name in _OUTPUTS if name in linears), None)
    if queries is None or names is None or output is None or _has_rotary_positions(module):
        return None
    heads = _first_int(module, _KEY_HEAD_COUNTS) or queries
    width = linears[output].in_features
    if width % queries or queries % heads:
        return None
    head_dim = width // queries
    is_fused = len(names) == 1
    widths = (3 * width,) if is_fused else (width, heads * head_dim, heads * head_dim)
    if tuple(linears[name].out_features for name in names) != widths or (is_fused and heads != queries):
        return None
    tables = {n: p for n, p in module.named_parameters() if n.endswith("relative_position_bias_table")}
    if any(parameter.ndim != 2 or parameter.shape[1] != heads or heads != queries for parameter in tables.values()):
        return None
    expected = {f"{name}.{leaf}" for name in (*names, output) for leaf in ("weight", "bias")} | tables.keys()
    if {name for name, _ in module.named_parameters()} - expected:
        return None  # norms on queries and keys, gates and so on, whose widths depend on the heads, too
    prefix = f"{path}." if path else ""
    return Attention(
        path=path,
        num_heads=heads,
        head_dim=head_dim,
        queries_per_head=queries // heads,
        projections=tuple(prefix + name for name in names),
        stacked=3 if is_fused else 1,
        output=prefix + output,
        tables=tuple(prefix + name for name in tables),
        returns_tuple=returns_tuple,
        written=_parameter_names(linears[output]),
    )


def _first_int(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the first of these attributes that is an integer."""
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _has_rotary_positions(module: nn.Module) -> bool:
    """Check whether positions rotate pairs of dims, which could then be removed in pairs only."""
    return bool({"rope", "position_embeddings", "rotary_pos_emb"} & set(signature(module.forward).parameters))


def _parameter_names(layer: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, _ in layer.named_parameters(recurse=False))


def find_patch_merging(model: nn.Module) -> Iterator[PatchMerging]:
    """Yield every patch merging (Swin) of the model.

    Raises:
        UnsupportedArchitectureError: A patch merging has an unknown build.
    """
    for path, module in model.named_modules():
        if not type(module).__name__.endswith("PatchMerging"):
            continue
        norm, reduction = getattr(module, "norm", None), getattr(module, "reduction", None)
        if (
            not isinstance(norm, nn.LayerNorm)
            or not isinstance(reduction, nn.Linear)
            or tuple(norm.normalized_shape) != (reduction.in_features,)
            or reduction.in_features % 4
        ):
            raise UnsupportedArchitectureError(
                f"{path} ({type(module).__name__}): the torch-pruning engine does not support this build of patch "
                "merging; it supports a LayerNorm over four patches followed by a linear layer, as in Swin. "
                "Use prune.engine: axes"
            )
        yield PatchMerging(path, f"{path}.norm", f"{path}.reduction", _parameter_names(reduction))
