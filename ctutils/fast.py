"""A copy of a frozen network that computes the same, faster: what `features` runs once over every slice."""

import copy
import ctypes
import operator
import platform
from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ctutils.backbones import BatchNorm


def reuse_large_blocks(keep: bool = True) -> None:
    """Ask glibc to keep large freed blocks instead of giving each back to the system; with `keep` False, no longer.

    Otherwise every activation of every batch is mapped afresh, and its page faults cost up to half the time. After a
    pass the blocks go back: what learns next may need them all (1 GB of VGG16's 4.5).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    size, blocks = (1 << 30, 0) if keep else (1 << 25, 1 << 16)
    if not mallopt(mmap_threshold, size) or not keep:  # an older glibc refuses more than 32 MB
        mallopt(mmap_max, blocks)
    mallopt(trim_threshold, size)
    if not keep:
        trim(0)


def inference_copy(
    backbone: nn.Module, precision: str = "float32", *, fold: bool = True, device: str = "cpu"
) -> nn.Module:
    """Return a copy of a frozen backbone that computes the same, faster.

    BatchNorm layers are folded into the convolutions before them; on a CPU, activations and residual sums are
    done in the convolution's own call; weights are laid out channels-last, and turned into bfloat16 if asked for.

    Args:
        backbone: maps images (B, 3, H, W) to features (B, D); left as it is.
        precision: `float32` or `bfloat16`.
        fold: False keeps every layer as it stands and only changes the precision.
        device: where the copy shall run.
    Returns:
        a module for use without gradients; features differ by at most 1e-5 (float32, relative) unfolded and
        1e-3 folded.
    Source: notebook 02, section 7.
    """
    reuse_large_blocks()
    fast = copy.deepcopy(backbone).to(device).eval().requires_grad_(False)
    graph = _trace(fast) if fold else None
    if graph is not None:
        _fold_batchnorm(fast, graph)
    if precision == "bfloat16":
        # What could not be folded (DenseNet normalises before it convolves) keeps exact statistics.
        norms = {name: copy.deepcopy(part) for name, part in fast.named_modules() if isinstance(part, BatchNorm)}
        fast.to(torch.bfloat16)
        for name, norm in norms.items():
            fast.set_submodule(name, norm)
    if fold:
        fast.to(memory_format=torch.channels_last)
    if graph is not None and device == "cpu" and _onednn_fuses(precision):
        return _fuse_activations(fast, graph)
    return fast


class _ConvTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (nn.Conv2d, BatchNorm)) or super().is_leaf_module(module, name)


def _trace(network: nn.Module) -> fx.Graph | None:
    """Return the network's graph of layers; None for a network that cannot be traced, which stays whole."""
    try:
        return _ConvTracer().trace(network)
    except (fx.proxy.TraceError, TypeError, NotImplementedError):
        return None


def _fold_batchnorm(network: nn.Module, graph: fx.Graph) -> None:
    """Fold, in place, each BatchNorm that alone follows a convolution into that convolution's weights.

    torch.fx's own `fuse` leaves timm's layers (subclasses of both) as they are.
    """
    modules = dict(network.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(id(modules[node.target]) for node in calls)  # a layer used twice has two inputs
    for node in calls:
        before, norm = node.all_input_nodes[0], modules[node.target]
        if not isinstance(norm, BatchNorm) or norm.running_mean is None or before.op != "call_module":
            continue
        conv = modules[before.target]
        if isinstance(conv, nn.Conv2d) and len(before.users) == 1 and times[id(conv)] == times[id(norm)] == 1:
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            conv.weight, conv.bias = weight, bias
            network.set_submodule(node.target, getattr(norm, "act", nn.Identity()))  # timm's has its ReLU inside


# ---------------------------------------------------------------- convolution and activation in one call

# oneDNN's names, with their numbers, of the activations that a convolution can do on its way out.
_ACTIVATIONS = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.Hardswish: ("hardswish", []),
    nn.Hardsigmoid: ("hardsigmoid", []),
}


class _FusedConv(nn.Module):
    """A convolution with the activation, or the residual sum and the activation, that follows it.

    Each of these alone would read and write the whole activation once more, which on a CPU with fast matrix
    units takes as long as the convolutions. The weights are laid out for oneDNN once, at the first batch, and
    not again in every batch. The calls are those that torch.compile makes.
    """

    def __init__(self, conv: nn.Conv2d, activation: str, numbers: list[float]):
        super().__init__()
        self.weight, self.packed = conv.weight.detach(), False
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.window = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.activation, self.numbers = activation, numbers

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        ops = torch.ops.mkldnn
        if not self.packed:
            self.weight, self.packed = ops._reorder_convolution_weight(self.weight, *self.window, x.shape), True
        layer = (self.weight, self.bias, *self.window)
        if other is None:
            return ops._convolution_pointwise(x, *layer, self.activation, self.numbers, "")
        unary = None if self.activation == "none" else self.activation
        return ops._convolution_pointwise.binary(x, other, *layer, "add", 1.0, unary, self.numbers, "")


def _onednn_fuses(precision: str) -> bool:
    """Whether this torch has the calls of `_FusedConv` for this processor, and they say what the layers say."""
    kind, near = (torch.bfloat16, 0.05) if precision == "bfloat16" else (torch.float32, 1e-5)
    try:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay where they were
            conv, x = nn.Conv2d(3, 4, 3, padding=1).to(kind), torch.linspace(-1, 1, 75).view(1, 3, 5, 5).to(kind)
        with torch.no_grad():
            y = conv(x)
            alone = _FusedConv(conv, "hardswish", [])(x)
            added = _FusedConv(conv, "relu", [])(x, y)
        expected = (nn.functional.hardswish(y), (2 * y).relu())
        return all(torch.allclose(*pair, atol=near) for pair in zip((alone, added), expected, strict=True))
    except (AttributeError, RuntimeError, TypeError):  # another torch or processor, or no oneDNN: go on without
        return False


class _Mean(nn.Module):
    """The mean over height and width: a third of the time of `AdaptiveAvgPool2d(1)` in bfloat16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, x.shape[-2:])


def _fuse_activations(network: nn.Module, graph: fx.Graph) -> nn.Module:
    """Return the network with every plain convolution doing what alone follows it as well."""
    modules = dict(network.named_modules())

    def calls(node: fx.Node | None, *kinds: type) -> bool:
        # Only these classes themselves: what is made from Conv2d may pad on its own.
        return node is not None and node.op == "call_module" and type(modules[node.target]) in kinds

    for node in [node for node in graph.nodes if calls(node, nn.Identity)]:  # a BatchNorm once, before the fold
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    for node in [node for node in graph.nodes if calls(node, nn.AdaptiveAvgPool2d)]:
        if modules[node.target].output_size in (1, (1, 1)):
            network.set_submodule(node.target, _Mean())
    for number, node in enumerate([node for node in graph.nodes if calls(node, nn.Conv2d)]):
        conv = modules[node.target]
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        chain, inputs = [node], [node.args[0]]
        after = _only_user(node)
        if after is not None and after.target in (operator.add, operator.iadd) and len(after.all_input_nodes) == 2:
            chain.append(after)
            inputs += [part for part in after.all_input_nodes if part is not node]
        after = _only_user(chain[-1])
        activation, numbers = "none", []
        if calls(after, *_ACTIVATIONS):
            chain.append(after)
            activation, numbers = _ACTIVATIONS[type(modules[after.target])]
        name = f"fused_{number}"
        modules[name] = _FusedConv(conv, activation, numbers)
        network.add_module(name, modules[name])
        with graph.inserting_after(chain[-1]):
            fused = graph.call_module(name, tuple(inputs))
        chain[-1].replace_all_uses_with(fused)
        for gone in reversed(chain):
            graph.erase_node(gone)
    graph.lint()
    return fx.GraphModule(network, graph)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
