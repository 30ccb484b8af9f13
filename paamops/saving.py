"""Models in one file: tensors as safetensors, all else as JSON in its header. Nothing is ever pickled or unpickled."""

import hashlib
import itertools
import json
import os
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from paamops import models, plan, scattering, tracing
from paamops.wrapping import unwrapped

VERSION = 2  # of what is written under the header's key "paamops"

# What the header of each version holds besides the version, and the type of each value.
HEADER = {"class": str, "recipe": dict | None, "training": bool, "frozen": list, "ties": dict, "sizes": dict}
HEADERS = {1: HEADER, 2: HEADER | {"modes": list, "source": dict, "kept": dict | None, "digest": str}}


class UnknownNetworkError(ValueError):
    """The file holds a network that `paamops.models` does not build, and no function that builds it was given."""


def save(model, path):
    """Write `model`, packed or not, to the file `path`, whole or not at all. A symbolic link is followed.

    Stored are all parameters and buffers (dtype and ties included), which parameters are trained, train or eval mode,
    the modules' sizes, the recipe of a network that `paamops.models` built, the indices that a packed network has kept
    (`paamops.kept`), the fingerprints of the modules that it was packed from, and a digest of all of it. Not stored:
    hooks, optimizers, code. DistributedDataParallel, DataParallel and torch.compile's wrapper are looked through.
    TypeError: `model` is not a module. ValueError: the model keeps extra state, which only pickle could store; `path`
    is a folder, a device or anything else but a regular file. FileNotFoundError: the folder of `path` is not there.
    """
    model = unwrapped(model)
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"model: {name or 'it'} keeps extra state (get_extra_state), which cannot be saved safely")
    tensors, ties, first = {}, {}, {}
    for name, tensor in named_tensors(model).items():
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            # A copy: tensors that share memory without being one, and strides that are not dense, would be refused.
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    header = {
        "version": VERSION,
        "torch": torch.__version__,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "recipe": getattr(model, "paamops_recipe", None),
        "training": model.training,
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "ties": ties,
        "sizes": {name: sizes for name, module in model.named_modules() if (sizes := module_sizes(module))},
        "modes": [name for name, module in model.named_modules() if module.training != model.training],
        "source": plan.fingerprints(model),
        "kept": encoded(plan.kept(model)) if plan.is_packed(model) else None,
    }
    if found := scattering.sizes(model):
        header["scatters"] = found
    header["digest"] = digest(header, tensors)
    metadata = {"paamops": json.dumps(header, separators=(",", ":"))}  # one entry: several are written in any order
    write(path, safetensors.torch.save(tensors, metadata=metadata))


def digest(header, tensors):
    """SHA-256 of the header but for its own digest, and of all tensors: names, dtypes, shapes, bytes.

    It finds damage and careless edits; whoever forges a file can forge it too.
    """
    header = {key: value for key, value in header.items() if key != "digest"}
    state = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        state.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        state.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()


def encoded(kept):
    """Kept indices for JSON: every vector once, and for every tensor the number of each axis's, or null."""
    vectors, axes, numbers = [], {}, {}
    for name, indices in kept.items():
        axes[name] = []
        for index in indices:
            key = None if index is None else tuple(index.tolist())
            if key is not None and key not in numbers:
                numbers[key] = len(vectors)
                vectors.append(list(key))
            axes[name].append(numbers.get(key))
    return {"vectors": vectors, "axes": axes}


def write(path, content):
    """Write the bytes `content` to the file `path`, whole or not at all. A symbolic link is followed."""
    path = destination(path)
    partial = partial_file(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name, should the machine itself go down
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def destination(path):
    """The regular file, there or not yet, that `path` leads to behind its symbolic links."""
    real = Path(os.path.realpath(path))
    if os.path.isdir(real):
        raise ValueError(f"{path}: is a folder; it must be a file")
    if os.path.lexists(real) and not os.path.isfile(real):
        raise ValueError(f"{path}: is not a regular file; writing would destroy it")
    if not os.path.isdir(real.parent):
        raise FileNotFoundError(f"{path}: its folder does not exist")
    return real


def partial_file(path):
    """What is written first and then renamed to `path`: in the same folder, so that the renaming is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def load(path, model=None):
    """The model that `save` wrote to `path`, on the CPU: same tensors, same sizes, same mode.

    A network of `paamops.models` is built again from its recipe. For a network of your own pass `model`, the function
    that builds it in full size without arguments; the stored, perhaps pruned, tensors and sizes then replace its own.
    It is called on PyTorch's meta device, where tensors take no memory, and again without where it needs their values.
    Nothing is traced: the network runs first when you run it, and can be pruned again as `pack` left it.

    ValueError: not such a file, truncated, changed since it was written, or not this network's; it says which tensor is
    missing, unexpected or of the wrong shape, or which module is another than the one that was packed. TypeError:
    `model` is no function, or builds no module. FileNotFoundError: no such file.
    """
    tensors, header = read(path)
    if model is None:
        if not header["recipe"]:
            raise UnknownNetworkError(f"{path}: holds a {header['class']}; pass model=, the function that builds it")
        model = build_from_recipe(path, header["recipe"])
    elif isinstance(model, nn.Module) or not callable(model):
        raise TypeError(f"model is a {type(model).__name__}; it must be a function that builds the network")
    else:
        model = built_by(model)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model built a {type(model).__name__}; it must build a torch.nn.Module")
    scattering.install_saved(path, model, header.get("scatters", {}), tensors)
    check_names(path, set(named_tensors(model)), {*tensors, *header["ties"]})
    full = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    built = plan.fingerprints(model)
    install_sizes(path, model, header["sizes"])
    install_tensors(path, model, tensors, header)
    check_source(path, built, header["source"])
    install_kept(path, model, full, header)
    model.train(header["training"])
    modules = dict(model.named_modules())
    for name in header["modes"]:
        if name.__class__ is not str or name not in modules:
            raise ValueError(f"{path}: has a mode of {name!r}, which the network does not have")
        modules[name].training = not header["training"]
    return model


def built_by(function):
    """What `function` builds, without memory for its tensors if it can be built so: the stored ones replace them."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = function()
        # A tensor that is no parameter or buffer would not be replaced.
        tables = ("_parameters", "_buffers", "_modules")
        others = [
            tracing.leaves([value for key, value in vars(m).items() if key not in tables]) for m in model.modules()
        ]
        if not any(tensor.is_meta for tensor in itertools.chain(*others)):
            return model
    except Exception:  # it looks at the values of its tensors, or it fails: then it does so again, and is heard
        pass
    return function()


def named_tensors(model):
    """Every parameter and buffer under every name it has, also buffers that are not part of a state dict."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def module_sizes(module):
    """The sizes in `module`, for JSON: ints, or lists of ints."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name in plan.SIZES
        if isinstance(value := vars(module).get(name), int | tuple)
    }


def read(path):
    """The tensors and the header of the file `path`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copied, so that nothing depends on the file any more.
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from error
    try:
        header = json.loads(metadata["paamops"])
        version = header["version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: a safetensors file, but not one that paamops.save wrote") from error
    if version.__class__ is not int or version not in HEADERS:
        known = " and ".join(map(str, HEADERS))
        raise ValueError(f"{path}: written in format {version}; this version of paamops reads formats {known}")
    check_header(path, header, set(tensors))
    if version > 1 and header["digest"] != digest(header, tensors):
        raise ValueError(f"{path}: damaged, or changed since it was written: its digest is not that of what it holds")
    if version == 1:  # it does not tell what a packed network has kept, nor of what
        header |= {"modes": [], "source": {}, "kept": {"vectors": [], "axes": {}}}
    return tensors, header


def check_header(path, header, stored):
    """The header must have the form that `save` gives it, and speak of the tensors `stored`."""
    missing = set(HEADERS[header["version"]]) - set(header)
    if missing:
        raise ValueError(f"{path}: its header lacks {', '.join(sorted(missing))}")
    for key, kind in HEADERS[header["version"]].items():
        if not isinstance(header[key], kind):
            raise ValueError(f"{path}: its header's {key} is {header[key]!r}, which paamops.save never writes")
    ties = header["ties"]
    for name in (*header["frozen"], *ties.values()):
        if name.__class__ is not str or name not in stored:
            raise ValueError(f"{path}: its header names {name}, which it does not hold")
    for name in ties:
        if name in stored:
            raise ValueError(f"{path}: {name} is both stored and tied to {ties[name]}")
    for name, sizes in header["sizes"].items():
        if not isinstance(sizes, dict) or not all(is_size(value) for value in sizes.values()):
            raise ValueError(f"{path}: its header's sizes of {name} are {sizes!r}; sizes are whole numbers")


def is_size(value):
    """Whether `value`, from JSON, can be a module's size: an int, or a list of ints."""
    return all(type(size) is int and size >= 0 for size in (value if isinstance(value, list) else [value]))


def build_from_recipe(path, recipe):
    """The network of a recipe without memory for its tensors: the stored ones come in their place."""
    try:
        with torch.device("meta"):
            return models.build(**recipe)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its recipe {recipe} is not one of paamops.models ({error})") from error


def check_names(path, wanted, found):
    """Both sets of names must be equal."""
    for names, what in ((wanted - found, "lacks"), (found - wanted, "has, unlike the network,")):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(f"{path}: {what} {shown}; it is not a file of this network")


def check_source(path, built, stored):
    """The modules that were built must be those that the stored ones were packed from."""
    other = [name or "the network itself" for name, found in stored.items() if built.get(name) != found]
    if other:
        shown = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        raise ValueError(f"{path}: not of this network, whose sizes, kinds or settings differ in {shown}")


def install_kept(path, model, full, header):
    """Let the model know which indices of the full-size network, whose shapes are `full`, it has kept."""
    if header["kept"] is None:  # it never was packed
        return
    tensors, kept = tracing.named_tensors(model), {}  # by their first names, as `plan` has them
    try:
        if not all(isinstance(vector, list) and is_size(vector) for vector in header["kept"]["vectors"]):
            raise ValueError("indices are whole numbers")
        vectors = dict(enumerate(torch.tensor(v, dtype=torch.int64) for v in header["kept"]["vectors"]))
        for name, slots in header["kept"]["axes"].items():
            axes = tuple(None if slot is None else vectors[slot] for slot in slots)
            for index, size, whole in zip(axes, tensors[name].shape, full[name], strict=True):
                fits = size == whole
                if index is not None:
                    fits = len(index) == size and bool((index.diff() > 0).all() and (index < whole).all())
                if not fits:
                    raise ValueError(f"those of {name} do not fit")
            kept[name] = axes
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its header's kept indices are not what paamops.save writes ({error})") from error
    plan.install(model, kept, {name: full[name] for name in kept})


def install_sizes(path, model, sizes):
    """Give every module its stored sizes."""
    modules = dict(model.named_modules())
    for name, stored in sizes.items():
        if name not in modules or set(stored) != set(module_sizes(modules[name])):
            raise ValueError(f"{path}: has sizes of {name or 'the network'} that the network does not have")
        for attribute, value in stored.items():
            value, own = tuple(value) if isinstance(value, list) else value, getattr(modules[name], attribute)
            # No 0 in place of 1: shapes are found by dividing by groups.
            if isinstance(value, tuple) != isinstance(own, tuple) or (value == 0 and own != 0):
                raise ValueError(f"{path}: {attribute} of {name or 'the network'} is {value}, in place of {own}")
            setattr(modules[name], attribute, value)


def install_tensors(path, model, tensors, header):
    """Put the stored tensors in the place of the network's own, tied ones as one."""
    own = named_tensors(model)
    for name, tensor in sorted(own.items()):
        source = header["ties"].get(name, name)
        check_shape(path, name, tuple(tensors[source].shape), tuple(tensor.shape), model)
        if isinstance(tensor, nn.Parameter) != isinstance(own[source], nn.Parameter):
            raise ValueError(f"{path}: {name} is tied to {source}; one is a parameter, the other a buffer")
    placed = {}
    for name, tensor in tensors.items():
        if isinstance(own[name], nn.Parameter):
            trained = name not in header["frozen"]
            if trained and not (tensor.is_floating_point() or tensor.is_complex()):
                raise ValueError(f"{path}: {name} is {tensor.dtype}, which cannot be trained")
            tensor = nn.Parameter(tensor, requires_grad=trained)
        placed[name] = tensor
    for name in own:
        module, _, leaf = name.rpartition(".")
        module = model.get_submodule(module)
        table = module._parameters if leaf in module._parameters else module._buffers
        table[leaf] = placed[header["ties"].get(name, name)]


def check_shape(path, name, shape, full, model):
    """A stored shape must follow from its module's stored sizes and be a part of the full-size one."""
    owner, _, leaf = name.rpartition(".")
    wanted = expected_shape(model.get_submodule(owner), leaf, full)
    if wanted is not None and shape != wanted:
        raise ValueError(f"{path}: {name} is {shape}; its module's sizes ask for {wanted}")
    if len(shape) != len(full) or any(a > b for a, b in zip(shape, full, strict=True)):
        raise ValueError(f"{path}: {name} is {shape}, which is no part of the network's {full}")


def expected_shape(module, leaf, full):
    """The shape of the tensor `leaf` by its module's sizes, or None where they do not decide it."""
    if isinstance(module, nn.modules.conv._ConvNd) and leaf in ("weight", "bias"):
        first, second = module.out_channels, module.in_channels // module.groups
        if module.transposed:
            first, second = module.in_channels, module.out_channels // module.groups
        return (first, second, *full[2:]) if leaf == "weight" else (module.out_channels,)
    if isinstance(module, nn.Linear) and leaf in ("weight", "bias"):
        return (module.out_features, module.in_features)[: len(full)]
    if isinstance(module, nn.modules.batchnorm._NormBase) and leaf != "num_batches_tracked":
        return (module.num_features,)
    return None
