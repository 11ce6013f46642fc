"""The Triton kernels of the triage, compiled on one machine for the GPU of another.

python -m peftk.tools.triage.ahead --target 90 --out FOLDER

compiles, without a GPU, what the groups will launch on GPUs of compute capability 9.0. `peftk selftest --triage
--kernels FOLDER` then puts it into Triton's cache, where the launches find it. Triton's key of a kernel has a hash of
all of Triton, the version of ptxas, some environment variables, the kernel's source, and the types, alignments and
options of the launch; no path and nothing of torch. The folder has the binary and the metadata of each kernel, by its
key, and manifest.json, which says what the keys were made with.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from peftk.tools.triage import prepare, records, stand_in
from peftk.tools.triage.environment import compiled_kernels
from peftk.tools.triage.groups import COMPILED

MOST_BYTES = 64 << 20
_MANIFEST = "manifest.json"


@click.command()
@click.option("--target", type=click.IntRange(80), required=True, help="Compute capability of the GPU, 90 for 9.0.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="A new or empty folder.")
def main(target: int, out: Path) -> None:
    """Compiles the Triton kernels of `peftk selftest --triage` for a GPU that is not here."""
    if out.is_dir() and any(out.iterdir()):
        raise click.UsageError(f"--out: expected a new or empty folder, got {out}")
    with tempfile.TemporaryDirectory() as cache:
        found = prepare.by_all_cores(COMPILED, target, Path(cache))
        if found.problem is not None:
            raise click.ClickException(found.problem)
        try:
            manifest = save(Path(cache), target, out)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
    kernels = manifest["kernels"].values()
    size, seconds = sum(kernel["bytes"] for kernel in kernels) / 2**20, (found.figures or {})["seconds"]
    click.echo(f"{out}: {len(kernels)} kernels, {size:.1f} MiB, in {seconds:.0f} s")


def save(cache: Path, target: int, out: Path) -> dict[str, Any]:
    """Writes the kernels of Triton's cache, and the manifest. Raises ValueError if they are too large."""
    kernels: dict[str, dict[str, Any]] = {}
    for binary in sorted(compiled_kernels(cache)):
        parts = _parts(binary.parent, binary.stem)
        size = sum(part.stat().st_size for part in parts)
        kernels[binary.parent.name] = {"name": binary.stem, "bytes": size, "sha256": _sha256(parts)}
    size = sum(kernel["bytes"] for kernel in kernels.values())
    if size > MOST_BYTES:
        raise ValueError(f"{len(kernels)} kernels: expected at most {MOST_BYTES} bytes, got {size}")
    for key, kernel in kernels.items():
        (out / key).mkdir(parents=True)
        for part in _parts(cache / key, kernel["name"]):
            shutil.copyfile(part, out / key / part.name)
    manifest = {"made with": _made_with(target), "kernels": kernels}
    out.mkdir(parents=True, exist_ok=True)
    (out / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def use(folder: Path, console: Console) -> None:
    """Gives the kernels of a folder to Triton, or says why they are not for this machine. Then `prepare` compiles."""
    from triton import knobs

    try:
        count = install(folder, prepare.capability(), Path(knobs.cache.dir))
    except Exception as reason:  # whatever is broken here, the groups shall run
        words = str(reason) if isinstance(reason, ValueError) else f"{type(reason).__name__}: {reason}"
        console.print(f"[yellow]{escape(words)}; the kernels compiled ahead are not used[/]", highlight=False)
    else:
        console.print(f"{count} kernels from {escape(str(folder))}", highlight=False)


def install(folder: Path, target: int, cache: Path) -> int:
    """Puts the kernels of a folder into Triton's cache; how many. target: compute capability of the GPU here.

    Raises ValueError, before it writes anything, if they are for another GPU, Triton, ptxas or package, or incomplete.
    """
    manifest = _read(folder)
    there, here = manifest["made with"], _made_with(target)
    for what in {**there, **here}:
        if there.get(what) != here.get(what):
            raise ValueError(f"{folder}: made for {what} {there.get(what)}, here it is {here.get(what)}")
    for key, kernel in manifest["kernels"].items():
        if _sha256(_parts(folder / key, kernel["name"])) != kernel["sha256"]:
            raise ValueError(f"{folder / key}: not the files that were compiled")
    for key, kernel in manifest["kernels"].items():
        (cache / key).mkdir(parents=True, exist_ok=True)
        paths = {}
        for part in _parts(folder / key, kernel["name"]):
            paths[part.name] = str(shutil.copyfile(part, cache / key / part.name))
        # Triton looks for this file first; the paths in it are absolute
        group = cache / key / f"__grp__{kernel['name']}.json"
        group.write_text(json.dumps({"child_paths": paths}), encoding="utf-8")
    return len(manifest["kernels"])


def _read(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if not all(isinstance(manifest[part], dict) for part in ("made with", "kernels")):
            raise TypeError
        for key, kernel in manifest["kernels"].items():
            if not (key.isalnum() and kernel["name"].isidentifier() and "sha256" in kernel):
                raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _MANIFEST}: expected a manifest of peftk.tools.triage.ahead") from error
    return manifest


def _parts(folder: Path, name: str) -> tuple[Path, Path]:
    """What Triton needs of a kernel: the binary and the metadata."""
    return folder / f"{name}.cubin", folder / f"{name}.json"


def _sha256(parts: Sequence[Path]) -> str | None:
    """Of several files one after the other; None if one is not there."""
    if not all(part.is_file() for part in parts):
        return None
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


def _made_with(target: int) -> dict[str, Any]:
    """Everything in the keys that is the same for all kernels; and the package, whose launches decide the rest."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import triton_key

    return {
        "target": target,
        "Triton": triton.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),  # Triton's library differs
        "Triton's files": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
        "ptxas": ", ".join(make_backend(stand_in.gpu_target(target)).hash().splitlines()[-3:-1]),
        "environment": json.dumps(get_cache_invalidating_env_vars(), sort_keys=True),
        "package": records.sources(),
    }


if __name__ == "__main__":
    main()
