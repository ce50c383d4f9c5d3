"""Builds the compiled kernels with the package; everything else about it is in pyproject.toml. See docs/building.md."""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = "src/chtconv/sparse_compute/csrc"
ROOT = Path(__file__).parent
COMMON = "common.c"  # compiled once; every other file once for each instruction set and type
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-ffp-contract=fast", "-fno-math-errno"]
TYPES = {"f32": [], "f64": ["-DCHTCONV_DOUBLE"]}
SCALAR = {"scalar": ["-DCHTCONV_BYTES=0"]}
AVX2 = ["-DCHTCONV_BYTES=32", "-mavx2", "-mfma"]
AVX512 = ["-DCHTCONV_BYTES=64", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]
INSTRUCTION_SETS = {
    "x86_64": {**SCALAR, "avx2": AVX2, "avx512": [*AVX512, "-mprefer-vector-width=512"]},
    "arm64": {**SCALAR, "neon": ["-DCHTCONV_BYTES=16"]},
}


def processors(platform: str) -> dict[str, list[str]]:
    """The processors that a platform tag of Python stands for, each with the flags that choose it.

    >>> processors("linux-aarch64"), processors("linux-ppc64le")
    ({'arm64': []}, {'ppc64le': []})
    >>> processors("macosx-11.0-arm64")
    {'arm64': ['-arch', 'arm64', '-mmacosx-version-min=11.0']}
    """
    system, _, rest = platform.partition("-")
    if system != "macosx":
        return {"arm64" if rest == "aarch64" else rest: []}
    version, processor = rest.split("-")
    names = ["arm64", "x86_64"] if processor == "universal2" else [processor]
    return {name: ["-arch", name, f"-mmacosx-version-min={version}"] for name in names}


def compilations(sources: Sequence[str], processor: str) -> Iterator[tuple[str, str, list[str]]]:
    """Every run of the compiler for one processor: source, name of the object file, and flags."""
    for source in sources:
        stem = Path(source).stem
        if Path(source).name == COMMON:
            yield source, f"{stem}.o", FLAGS
            continue
        for isa, wide in INSTRUCTION_SETS.get(processor, SCALAR).items():
            for kind, define in TYPES.items():
                yield source, f"{stem}_{kind}_{isa}.o", [*FLAGS, f"-DCHTCONV_ISA={isa}", *define, *wide]


def build(sources: Sequence[str], platform: str, folder: Path, output: Path) -> None:
    """Compiles and links the shared library, which can tell what it was built from.

    ``CC``, ``CFLAGS`` and ``LDFLAGS`` are those of the environment.

    Raises:
        CompileError: with the reason.
    """
    compiler = shlex.split(os.environ.get("CC") or next(filter(shutil.which, ["cc", "gcc", "clang"]), "cc"))
    compiler += shlex.split(os.environ.get("CFLAGS", ""))
    digest = runpy.run_path(str(ROOT / "src/chtconv/sparse_compute/sources.py"))["digest"]
    compiler.append(f'-DCHTCONV_SOURCES="{digest(Path(sources[0]).parent)}"')
    linked = shlex.split(os.environ.get("LDFLAGS", ""))
    parts = []
    for processor, chosen in processors(platform).items():
        objects = folder / processor
        objects.mkdir(parents=True, exist_ok=True)
        todo = [(source, str(objects / name), flags) for source, name, flags in compilations(sources, processor)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, [[*compiler, *flags, *chosen, "-c", source, "-o", o] for source, o, flags in todo]))
        parts.append(str(objects / output.name))
        _run([*compiler, "-shared", *chosen, *(o for _, o, _ in todo), *linked, "-lm", "-o", parts[-1]])
    if len(parts) > 1:
        together = str(folder / output.name)
        _run(["lipo", "-create", *parts, "-output", together])
        parts = [together]
    output.parent.mkdir(parents=True, exist_ok=True)
    _put(Path(parts[0]), output)


def _run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(str(error)) from error


def _put(source: Path, target: Path) -> None:
    """Replaces a file in one step: a process that has loaded the old one keeps it."""
    beside = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy(source, beside)
    beside.replace(target)


def wanted() -> str:
    """The value of ``CHTCONV_BUILD_KERNELS``.

    ``0``: no kernels. ``1``: it is an error where they cannot be built. Empty, as without it: then the package is
    installed without.

    Raises:
        SystemExit: for every other value.
    """
    word = os.environ.get("CHTCONV_BUILD_KERNELS", "")
    if word not in ("", "0", "1"):
        raise SystemExit(f"CHTCONV_BUILD_KERNELS={word!r}: accepted are 0, 1, and nothing.")
    return word


class BuildKernels(build_ext):
    """Builds the one library of the package, or says why not and goes on, see :func:`wanted`."""

    def get_ext_filename(self, fullname):
        """The same for every Python, whose interface the library does not use."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):  # noqa: D102
        output, word = Path(self.get_ext_fullpath(ext.name)), wanted()
        output.unlink(missing_ok=True)
        try:
            if word == "0":
                raise CompileError("CHTCONV_BUILD_KERNELS=0")
            if sys.platform == "win32":
                raise CompileError("they are not made for Windows")
            build(ext.sources, self.plat_name, Path(self.build_temp), output)
        except CompileError as reason:
            if word == "1":
                raise
            print(f"chtconv: installing without the compiled kernels: {reason}", file=sys.stderr, flush=True)

    def copy_extensions_to_source(self):
        """Of an editable install: no older library stays where none could be built."""
        for ext in self.extensions:
            there, built = map(Path, self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext))
            if built.exists():
                _put(built, there)
            else:
                there.unlink(missing_ok=True)

    def get_output_mapping(self):  # noqa: D102
        return {built: there for built, there in super().get_output_mapping().items() if os.path.exists(there)}

    def get_outputs(self):  # noqa: D102
        return [path for path in super().get_outputs() if os.path.exists(path)]


class TagWheel(bdist_wheel):
    """Tags wheels by platform alone, and not even by that without the library."""

    def get_tag(self):  # noqa: D102
        platform = super().get_tag()[2]
        kernels = self.get_finalized_command("build_ext")
        built = any(os.path.exists(kernels.get_ext_fullpath(ext.name)) for ext in kernels.extensions)
        return "py3", "none", platform if built else "any"


if __name__ == "__main__":
    folder = Path(SOURCES)
    kernels = Extension(
        "chtconv.sparse_compute._native",
        sources=[path.as_posix() for path in sorted(folder.glob("*.c"))],
        depends=[path.as_posix() for path in sorted(folder.glob("*.h"))],
    )
    setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels, "bdist_wheel": TagWheel})
