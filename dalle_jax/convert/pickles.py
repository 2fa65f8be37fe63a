"""Pickles of tensors, read without PyTorch and without running anything of them.

A pickle is a program for a stack machine: it names functions and has them called. The machine here has names and plain
data on its stack and nothing that can be called. It knows what PyTorch's functions for tensors mean, leaves an empty
object where a checkpoint has something harmless, and refuses every other name.
"""

import pickletools
import re
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dalle_jax.convert import stored
from dalle_jax.convert.stored import Stored
from dalle_jax.errors import UserError

_TYPES = {
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": jnp.bfloat16,
    "Double": np.float64,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
_STORAGE = re.compile(rf"torch\.(?:cuda\.)?({'|'.join(_TYPES)})Storage")
_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_PARAMETER = "torch._utils._rebuild_parameter"
_DICT = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
_HARMLESS = re.compile(  # settings and progress of trainings, which lie beside the tensors
    r"""torch\.(Size|device|(b?float|u?int|complex)\d+|bool)
    |omegaconf\.(dictconfig|listconfig|base|nodes)\.[A-Z]\w*
    |(pytorch_lightning|lightning|lightning_fabric)\.([a-z_]+\.)*(callbacks|utilities)\.([a-z_]+\.)*[A-Z]\w*
    |collections\.(Counter|deque)|(builtins|__builtin__)\.(bool|bytes|complex|float|frozenset|int|list|long|set|str|tuple)
    |argparse\.Namespace|datetime\.\w+|fsspec\.(implementations\.local\.LocalFileSystem|spec\.make_instance)
    |typing\.Any|pathlib\.(Pure)?(Posix|Windows)?Path|copy_?reg\._reconstructor|_codecs\.encode
    |numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|dtypes\.\w+)""",
    re.VERBOSE,
)
# Operations that put their argument on the stack and do nothing else.
_CONSTANTS = {
    operation.name
    for operation in pickletools.opcodes
    if operation.arg and not operation.stack_before and operation.stack_after not in ([], [pickletools.anyobject])
}
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class Name(NamedTuple):
    """A function or class that a pickle names, as a word."""

    text: str


class Storage(NamedTuple):
    """Numbers of one type in a file, of which tensors are views; start: in bytes, size: in numbers."""

    path: str
    dtype: np.dtype
    start: int
    size: int


def load(path: str, file: IO[bytes], storage: Callable[[np.dtype, str, int], Storage]) -> Any:
    """The object of the next pickle of a file: tensors as `Stored`, dicts with their text keys, lists, plain data.

    path: of the file, for messages. storage: type, key and count of a storage -> where it lies.

    Raises:
      UserError: it would call something else.
      Exception: of any kind, where it is no pickle or a damaged one.
    """
    stack: list = []
    outer: list[list] = []  # stacks below the marks
    memo: dict[int, Any] = {}

    def since_mark() -> list:
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    def named(name: str) -> Name:
        if not re.fullmatch(r"[\w.<>]+", name):
            raise ValueError("a pickle that calls something without a name")
        if name not in (*_TENSOR, _PARAMETER, *_DICT) and not (_STORAGE.fullmatch(name) or _HARMLESS.fullmatch(name)):
            raise UserError(
                f"expected names and tensors in {path}, but it would call {name[:200]}, and nothing of it was run: ask "
                "for its state dict, torch.save(module.state_dict(), FILE), or for safetensors"
            )
        return Name(name)

    value: Any
    for operation, value, _ in pickletools.genops(file):
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case name if name in _CONSTANTS:
                stack.append(value)
            case "NONE" | "NEWTRUE" | "NEWFALSE" as name:
                stack.append(_FIXED[name])
            case "MARK":
                outer.append(stack)
                stack = []
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                size = int(name[-1]) if name[-1].isdigit() else 0
                stack[len(stack) - size :] = [tuple(stack[len(stack) - size :])]
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                _add(stack[-1], [item])
            case "APPENDS":
                items = since_mark()
                _add(stack[-1], items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                items = [stack.pop(-2), stack.pop()]
                _with(stack[-1], items)
            case "SETITEMS":
                items = since_mark()
                _with(stack[-1], items)
            case "GLOBAL" | "INST":
                stack.append(named(value.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(named(".".join([stack.pop(-2), stack.pop()])))
            case "REDUCE" | "NEWOBJ":
                stack.append(_called(stack.pop(-2), stack.pop()))
            case "BUILD":  # attributes of an object
                stack.pop()
            case "BINPERSID":
                stack.append(_storage(stack.pop(), storage))
            case other:
                raise ValueError(f"the pickle operation {other}, which state dicts do not have")
    raise ValueError("a pickle without an end")


def _add(target: object, items: list) -> None:
    if isinstance(target, list):
        target.extend(items)


def _with(target: Any, items: list) -> Any:
    """The dict with keys and values in turns; only text keys, as tensors have names."""
    if isinstance(target, dict):
        target.update((k, v) for k, v in zip(items[::2], items[1::2], strict=True) if isinstance(k, str))
    return target


def _called(function: Name, args: tuple) -> Any:
    if function.text in _TENSOR:
        return _tensor(*args[:4])
    if function.text == _PARAMETER:
        return args[0]
    if function.text in _DICT:
        pairs = args[0] if args and isinstance(args[0], list) else []  # Python 2 gives them at once
        return _with({}, [part for key, value in pairs for part in (key, value)])
    return object()


def _storage(description: tuple, storage: Callable[[np.dtype, str, int], Storage]) -> Storage:
    kind, name, key, _, count, *view = description
    match = _STORAGE.fullmatch(name.text)
    if kind != "storage" or match is None or any(view) or not _is_size(count):
        raise ValueError("a storage of a form that is not known")
    return storage(np.dtype(_TYPES[match[1]]), str(key), count)


def _tensor(storage: Storage, first: int, shape: tuple, strides: tuple) -> Stored:
    if len(shape) != len(strides) or not all(map(_is_size, (first, *shape, *strides))):
        raise ValueError("a tensor of an impossible shape")
    last = first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.size:
        raise ValueError("a tensor that is larger than its storage")
    start = storage.start + first * storage.dtype.itemsize
    return stored.numbers(storage.path, storage.dtype, shape, start=start, strides=strides)


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0
