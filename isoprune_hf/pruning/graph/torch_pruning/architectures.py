"""The only knowledge of particular architectures: how attention and patch merging are built, by their parts."""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature

from torch import nn
from transformers import PreTrainedModel

from isoprune_hf.errors import UnsupportedArchitectureError


@dataclass(frozen=True)
class Attention:
    """Where one multi-head attention keeps its parts; names are relative to the model.

    Args:
        path: The module that holds `num_heads` and its kin.
        num_heads: Heads that can leave: those of keys and values.
        head_dim: Dims of a head.
        queries_per_head: Query heads that share one head of keys and values; 1 unless query heads are grouped.
        projections: The linears that make queries, keys and values, in the order of execution.
        stacked: How many of query, key and value lie one behind the other in each linear: 3 when fused.
        output: The linear that reads the heads.
        tables: Parameters with one column for each head (relative-position biases), heads in dim 1.
        returns_tuple: The module returns (output, weights), as in transformers.
        written: Parameters of `output`: weight, and bias if it has one.
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
    """Where a patch merging keeps its parts: a norm over four copies of every channel, then a linear.

    Args:
        path: The module.
        norm: Its norm, over (4 x channels).
        reduction: Its linear, (4 x channels) -> out.
        written: Parameters of `reduction`: weight, and bias if it has one.
    """

    path: str
    norm: str
    reduction: str
    written: tuple[str, ...]


# Where an attention module keeps its numbers of heads, in timm and in transformers.
_QUERY_HEAD_COUNTS = ("num_heads", "num_attention_heads")
_KEY_HEAD_COUNTS = ("num_kv_heads", "num_key_value_heads")
_PROJECTIONS = (("qkv",), ("q_proj", "k_proj", "v_proj"))
_OUTPUTS = ("proj", "o_proj")


def find_attention(model: nn.Module) -> Iterator[Attention]:
    """Yield every multi-head attention of the model.

    Raises:
        UnsupportedArchitectureError: An attention of an unknown build: a cut could break it, so none is made.
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
                f"{path} ({type(module).__name__}) is an attention of an unknown build; supported are separate or "
                "fused query, key and value projections, grouped or not, with no norms or rotary positions inside, "
                "as in ViT, DeiT and Swin"
            )


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return ("attention" in name or name.endswith("attn")) and any(True for _ in module.parameters())


def _read_attention(path: str, module: nn.Module, *, returns_tuple: bool) -> Attention | None:
    queries = _number(module, _QUERY_HEAD_COUNTS)
    parts = dict(module.named_children())
    names = next((names for names in _PROJECTIONS if all(isinstance(parts.get(n), nn.Linear) for n in names)), None)
    output = next((name for name in _OUTPUTS if isinstance(parts.get(name), nn.Linear)), None)
    if queries is None or names is None or output is None or _rotates(module):
        return None
    heads = _number(module, _KEY_HEAD_COUNTS) or queries
    width = parts[output].in_features
    if width % queries or queries % heads:
        return None
    head_dim, is_fused = width // queries, len(names) == 1
    widths = (3 * width,) if is_fused else (width, heads * head_dim, heads * head_dim)
    if tuple(parts[name].out_features for name in names) != widths or (is_fused and heads != queries):
        return None
    tables = [(n, p) for n, p in module.named_parameters() if n.endswith("relative_position_bias_table")]
    if any(parameter.ndim != 2 or parameter.shape[1] != heads or heads != queries for _, parameter in tables):
        return None
    expected = {f"{name}.{leaf}" for name in (*names, output) for leaf in ("weight", "bias")} | {n for n, _ in tables}
    if {name for name, _ in module.named_parameters()} - expected:
        return None  # norms on queries and keys, gates, ...: their widths would have to follow
    prefix = f"{path}." if path else ""
    return Attention(
        path=path,
        num_heads=heads,
        head_dim=head_dim,
        queries_per_head=queries // heads,
        projections=tuple(prefix + name for name in names),
        stacked=3 if is_fused else 1,
        output=prefix + output,
        tables=tuple(prefix + name for name, _ in tables),
        returns_tuple=returns_tuple,
        written=_own(parts[output]),
    )


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), int)), None)


def _rotates(module: nn.Module) -> bool:
    """Whether positions rotate pairs of dims, which could then leave in pairs only."""
    return bool({"rope", "position_embeddings", "rotary_pos_emb"} & set(signature(module.forward).parameters))


def _own(layer: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, _ in layer.named_parameters(recurse=False))


def find_patch_merging(model: nn.Module) -> Iterator[PatchMerging]:
    """Yield every patch merging (Swin) of the model.

    Raises:
        UnsupportedArchitectureError: A patch merging of an unknown build.
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
                f"{path} ({type(module).__name__}) is a patch merging of an unknown build; supported is Swin's: "
                "a LayerNorm over four patches, then a linear"
            )
        yield PatchMerging(path, f"{path}.norm", f"{path}.reduction", _own(reduction))
