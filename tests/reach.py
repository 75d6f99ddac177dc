"""The tensors that an object holds, wherever they are."""

import gc
import types

import torch

LEAVES = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.device, torch.dtype)


def tensors(root):
    """Every tensor that can be reached from an object."""
    seen, todo, found = set(), [root], []
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, LEAVES):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found.append(one)
        todo += gc.get_referents(one)
    return found


def held_bytes(root):
    """Bytes of all storages that can be reached, and of packed matrices, which have none that torch shows."""
    found = tensors(root)
    packed = {id(one): torch.ops.mkldnn._nbytes(one) for one in found if one.is_mkldnn}
    plain = [one.untyped_storage() for one in found if not one.is_mkldnn]
    return sum(packed.values()) + sum({one.data_ptr(): one.nbytes() for one in plain if one.nbytes()}.values())
