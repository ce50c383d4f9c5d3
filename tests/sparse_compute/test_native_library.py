"""The compiled kernels are found, loaded, refused and called as library.py says; setup.py builds what it looks for."""

import _ctypes
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from chtconv.errors import ChtconvWarning, ConfigurationError
from chtconv.sparse_compute import library as module
from chtconv.sparse_compute.library import Library, library
from chtconv.sparse_compute.sources import digest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "src/chtconv/sparse_compute/csrc"
BUILT = library()
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_kernels = pytest.mark.skipif(BUILT is None, reason="there are no compiled kernels")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="there is no compiler")
FILE = Path(os.environ.get("CHTCONV_LIBRARY") or Path(module.__file__).with_name("_native.so"))


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not asked for the kernels yet, in as far as library.py can tell."""
    for name in ("CHTCONV_KERNELS", "CHTCONV_ISA", "CHTCONV_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    library.cache_clear()
    yield monkeypatch
    library.cache_clear()


def compiled(folder: Path, source: str) -> Path:
    path = folder / "made.so"
    (folder / "made.c").write_text("#include <stdint.h>\n" + source)
    subprocess.run([COMPILER, "-shared", "-fPIC", str(folder / "made.c"), "-o", str(path)], check=True)
    return path


def python(code: str, **environment: str) -> str:
    """What a process of its own prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CHTCONV_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


# ---- Loading ---------------------------------------------------------------------------------------------------------


def test_versions_agree():
    header = (CSRC / "common.h").read_text()
    assert re.findall(r"#define CHTCONV_ABI_VERSION (\d+)", header) == [str(module.ABI_VERSION)]


@needs_kernels
def test_scalar_is_always_supported_and_the_widest_is_taken(fresh):
    kernels = Library(FILE)
    assert kernels.supported[-1] == "scalar"
    assert kernels.isa == kernels.supported[0]


@needs_kernels
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="/proc/cpuinfo is of Linux")
def test_supported_agrees_with_the_system():
    words = set(Path("/proc/cpuinfo").read_text().split())
    expected = []
    if {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= words:
        expected.append("avx512")
    if {"avx2", "fma"} <= words:
        expected.append("avx2")
    if "asimd" in words:
        expected.append("neon")
    assert BUILT.supported == (*expected, "scalar")


@needs_kernels
def test_every_kernel_is_there_for_every_type_and_instruction_set():
    names = {
        name for path in CSRC.glob("*.c") for name in re.findall(r"CHTCONV_API \w+ \*?NAME\((\w+)\)", path.read_text())
    }
    assert names
    file = ctypes.CDLL(str(FILE))
    missing = [
        f"{name}_{kind}_{isa}"
        for name in names
        for kind in ("f32", "f64")
        for isa in BUILT.supported
        if not hasattr(file, f"{name}_{kind}_{isa}")
    ]
    assert not missing


@needs_kernels
def test_threads_are_those_of_torch_where_it_lends_them():
    major, minor = map(int, torch.__version__.split(".")[:2])
    assert BUILT.threaded == ((major, minor) >= (2, 10))


@needs_kernels
def test_an_older_torch_is_enough(fresh):
    code = (
        "import ctypes, torch\n"
        "real = ctypes.CDLL\n"
        "class Without:\n"
        "    def __init__(self, path): self.file = real(path)\n"
        "    def __getattr__(self, name):\n"
        "        if name == 'torch_parallel_for': raise AttributeError(name)\n"
        "        return getattr(self.file, name)\n"
        "ctypes.CDLL = Without\n"
        "from chtconv.sparse_compute.library import library\n"
        "print(library().threaded)"
    )
    assert python(code, CHTCONV_LIBRARY=str(FILE)) == "False"


# ---- What cannot be loaded -------------------------------------------------------------------------------------------


def refused(fresh, path: Path) -> str:
    """The reason that the one warning gives; no later call repeats it."""
    fresh.setenv("CHTCONV_LIBRARY", str(path))
    with pytest.warns(ChtconvWarning) as said:
        assert library() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library() is None
    assert len(said) == 1
    assert "docs/building.md" in str(said[0].message)
    return str(said[0].message)


def test_a_missing_file_is_named_once(fresh, tmp_path):
    path = tmp_path / "nothing.so"
    assert f"{path} does not exist" in refused(fresh, path)


def test_a_broken_file_is_named_once(fresh, tmp_path):
    path = tmp_path / "broken.so"
    path.write_bytes(b"no library")
    assert str(path) in refused(fresh, path)


def test_a_library_of_something_else_is_refused(fresh):
    path = Path(_ctypes.__file__)
    assert f"{path} has interface version none" in refused(fresh, path)


@needs_compiler
def test_another_version_is_refused(fresh, tmp_path):
    path = compiled(tmp_path, "int chtconv_abi_version(void) { return 999; }")
    assert f"interface version 999, and {module.ABI_VERSION} is needed" in refused(fresh, path)


@needs_kernels
def test_a_library_of_other_sources_than_those_beside_is_refused(fresh, tmp_path):
    """What an editable install sees after a change of csrc; a wheel has no sources, and only the version counts."""
    beside = tmp_path / "csrc"
    shutil.copytree(CSRC, beside)
    fresh.setattr(module, "__file__", str(tmp_path / "library.py"))
    fresh.setenv("CHTCONV_LIBRARY", str(FILE))
    assert library() is not None
    library.cache_clear()
    (beside / "links.c").write_bytes((beside / "links.c").read_bytes() + b"\n")
    assert f"{FILE} was built from other sources than those in csrc: build it again" in refused(fresh, FILE)
    library.cache_clear()
    shutil.rmtree(beside)
    assert library() is not None


@needs_compiler
def test_a_library_that_names_no_sources_is_refused_beside_some(fresh, tmp_path):
    path = compiled(tmp_path, f"int chtconv_abi_version(void) {{ return {module.ABI_VERSION}; }}")
    shutil.copytree(CSRC, tmp_path / "csrc")
    fresh.setattr(module, "__file__", str(tmp_path / "library.py"))
    assert "build it again" in refused(fresh, path)


def test_sources_are_told_by_names_and_bytes(tmp_path):
    def made(folder, *files):
        for name, content in files:
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(content)
        return digest(tmp_path / folder)

    files = [("a.c", b"1\n"), ("b.h", b"2\n"), ("c.c", b"")]
    first = made("first", *files)
    assert first == made("second", *reversed(files), ("a.o", b"of a compiler"))
    others = [made("third", ("a.c", b"1\r\n"), *files[1:]), made("fourth", ("b.c", b"1\n"), *files[1:]), made("none")]
    assert len({first, *others}) == 4
    assert others[-1] == ""


def test_a_process_warns_once(tmp_path):
    code = (
        "import warnings\n"
        "from chtconv.sparse_compute.library import library\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    print([library(), library()], len(said))"
    )
    assert python(code, CHTCONV_LIBRARY=str(tmp_path / "nothing.so")) == "[None, None] 1"


# ---- What the environment asks for -----------------------------------------------------------------------------------


def test_off_is_silent(fresh, tmp_path):
    fresh.setenv("CHTCONV_KERNELS", "off")
    fresh.setenv("CHTCONV_LIBRARY", str(tmp_path / "nothing.so"))
    assert library() is None


def test_other_words_than_on_and_off_are_refused(fresh):
    fresh.setenv("CHTCONV_KERNELS", "offf")
    with pytest.raises(ConfigurationError, match=r"CHTCONV_KERNELS 'offf'.*'on', 'off'"):
        library()


@needs_kernels
def test_width_is_forced_from_outside():
    code = "from chtconv.sparse_compute.library import library; print(library().isa)"
    for isa in {BUILT.supported[0], "scalar"}:
        assert python(code, CHTCONV_LIBRARY=str(FILE), CHTCONV_ISA=isa) == isa
    assert python(code, CHTCONV_LIBRARY=str(FILE), CHTCONV_ISA="") == BUILT.supported[0]


@needs_kernels
def test_an_unknown_width_is_refused(fresh):
    fresh.setenv("CHTCONV_LIBRARY", str(FILE))
    fresh.setenv("CHTCONV_ISA", "sclar")
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"'sclar': did you mean 'scalar'\? Accepted: .*'scalar'"):
            library()


@needs_kernels
def test_a_width_that_this_processor_lacks_is_refused(fresh):
    lacking = next(isa for isa in ("neon", "avx512", "avx2") if isa not in BUILT.supported)
    kernels = Library(FILE)
    with pytest.raises(
        ConfigurationError, match=rf"'{lacking}': this processor does not run it\. Accepted: .*'scalar'"
    ):
        kernels.use(lacking)
    assert kernels.isa == kernels.supported[0]
    kernels.use("scalar")
    assert kernels.isa == "scalar"


# ---- Calling ---------------------------------------------------------------------------------------------------------

MADE = f"""
int chtconv_abi_version(void) {{ return {module.ABI_VERSION}; }}
const char *chtconv_sources(void) {{ return "{digest(CSRC)}"; }}
"""
MADE += """
int chtconv_supported(void) { return 1; }
void chtconv_use_threads(void *address) {}
int total_f32_scalar(const float *x, int64_t count, float *out, const void *nothing, int64_t *seen, double scale) {
    float sum = 0;
    for (int64_t i = 0; i < count % 1000; i++) sum += x[i];
    *out = sum * scale;
    *seen = nothing ? -1 : count;
    return 0;
}
int total_f64_scalar(const double *x, int64_t count, double *out, const void *nothing, int64_t *seen, double scale) {
    return *seen;
}
"""


@needs_compiler
def test_arguments_arrive(tmp_path, fresh):
    kernels = Library(compiled(tmp_path, MADE))
    x, out, seen = torch.arange(6.0)[1:], torch.zeros(1), ctypes.c_int64()
    count = 7_000_000_000_005  # needs all 64 bits
    kernels.call("total", torch.float32, x, count, out, None, ctypes.byref(seen), ctypes.c_double(0.5))
    assert out.item() == 7.5
    assert seen.value == count
    kernels.call("total", torch.float32, torch.nn.Parameter(x), 1, out, x, ctypes.byref(seen), ctypes.c_double(1))
    assert out.item() == 1
    assert seen.value == -1


@needs_compiler
@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (1, MemoryError, "not enough memory"),
        (2, RuntimeError, "argument"),
        (3, RuntimeError, "threads"),
        (77, RuntimeError, "error 77"),
    ],
)
def test_codes_become_errors(tmp_path, fresh, code, error, words):
    kernels = Library(compiled(tmp_path, MADE))
    with pytest.raises(error, match=f"kernel total: .*{words}"):
        kernels.call("total", torch.float64, None, 0, None, None, ctypes.byref(ctypes.c_int64(code)), None)


@needs_kernels
def test_other_types_are_refused():
    with pytest.raises(
        ConfigurationError, match=r"torch\.float16 numbers; accepted are torch\.float32, torch\.float64"
    ):
        BUILT.call("outputs", torch.float16)


@needs_kernels
def test_tensors_without_memory_are_refused():
    with pytest.raises(RuntimeError, match="a Tensor on meta: kernels take tensors on the CPU"):
        BUILT.call("plan", torch.float32, torch.empty(3, device="meta"))


# ---- Building --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup():
    pytest.importorskip("setuptools.command.bdist_wheel")
    spec = importlib.util.spec_from_file_location("chtconv_setup", ROOT / "setup.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize(
    ("processor", "widths"),
    [
        ("x86_64", {"scalar": 0, "avx2": 32, "avx512": 64}),
        ("arm64", {"scalar": 0, "neon": 16}),
        ("riscv64", {"scalar": 0}),
    ],
)
def test_every_file_is_compiled_for_each_width_and_type(setup, processor, widths):
    jobs = {name: flags for _, name, flags in setup.compilations(["a/common.c", "a/one.c", "a/two.c"], processor)}
    expected = {f"{stem}_{kind}_{isa}.o" for stem in ("one", "two") for kind in ("f32", "f64") for isa in widths}
    assert set(jobs) == expected | {"common.o"}
    for name, flags in jobs.items():
        if name == "common.o":
            assert not any(flag.startswith(("-m", "-DCHTCONV")) for flag in flags)
            continue
        _, kind, isa = name[:-2].split("_")
        assert f"-DCHTCONV_ISA={isa}" in flags
        assert f"-DCHTCONV_BYTES={widths[isa]}" in flags
        assert ("-DCHTCONV_DOUBLE" in flags) == (kind == "f64")
        assert any("avx512" in flag for flag in flags) == (isa == "avx512")
        assert any(flag.startswith("-m") for flag in flags) == isa.startswith("avx")


@pytest.mark.parametrize(
    ("platform", "names"),
    [
        ("linux-x86_64", ["x86_64"]),
        ("linux-aarch64", ["arm64"]),
        ("linux-i686", ["i686"]),
        ("macosx-11.0-arm64", ["arm64"]),
        ("macosx-10.13-x86_64", ["x86_64"]),
        ("macosx-10.13-universal2", ["arm64", "x86_64"]),
    ],
)
def test_processors_of_platforms(setup, platform, names):
    chosen = setup.processors(platform)
    assert list(chosen) == names
    for name, flags in chosen.items():
        assert (["-arch", name] == flags[:2]) == platform.startswith("macosx")


FAKE = """#!{python}
import pathlib, sys
pathlib.Path({log!r}).open("a").write(" ".join(sys.argv[1:]) + "\\n")
pathlib.Path(sys.argv[sys.argv.index("-o" if "-o" in sys.argv else "-output") + 1]).write_text("made")
"""


@needs_compiler
def test_a_library_tells_what_it_was_built_from(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", COMPILER)
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc/common.c"
    source.write_text('__attribute__((visibility("default"))) const char *told(void) { return CHTCONV_SOURCES; }')
    setup.build([str(source)], "linux-x86_64", tmp_path, tmp_path / "_native.so")
    file = ctypes.CDLL(str(tmp_path / "_native.so"))
    file.told.restype = ctypes.c_char_p
    assert file.told().decode() == digest(tmp_path / "csrc")


@pytest.mark.parametrize("platform", ["linux-x86_64", "macosx-10.13-universal2"])
def test_commands(setup, tmp_path, monkeypatch, platform):
    log, fake = tmp_path / "log", tmp_path / "lipo"
    fake.write_text(FAKE.format(python=sys.executable, log=str(log)))
    fake.chmod(0o755)
    for name, value in {"CC": f"{fake} first", "CFLAGS": "-g", "LDFLAGS": "-Wl,-x", "PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "there/_native.so"
    setup.build(["a/common.c", "a/one.c"], platform, tmp_path / "temp", output)
    assert output.read_text() == "made"
    assert [path.name for path in output.parent.iterdir()] == ["_native.so"]
    lines = log.read_text().splitlines()
    links, compiles = [x for x in lines if " -shared " in x], [x for x in lines if " -c " in x]
    processors = setup.processors(platform)
    assert len(links) == len(processors)
    assert len(compiles) == sum(1 + 2 * len(setup.INSTRUCTION_SETS[name]) for name in processors)
    assert all(line.startswith("first -g ") for line in links + compiles)
    for link, name in zip(links, processors, strict=True):
        objects = [line.split(" -o ")[1] for line in compiles if f"/{name}/" in line]
        assert [word for word in link.split() if word.endswith(".o")] == sorted(objects, key=link.index)
        assert "-Wl,-x" in link.split()
    assert ("-create" in lines[-1]) == (len(processors) > 1)


@pytest.mark.parametrize("word", ["true", "yes", "2", " 1"])
def test_other_words_for_building_are_refused(setup, monkeypatch, word):
    monkeypatch.setenv("CHTCONV_BUILD_KERNELS", word)
    with pytest.raises(SystemExit, match=rf"CHTCONV_BUILD_KERNELS='{word}'.*accepted are 0, 1"):
        setup.wanted()


@pytest.mark.parametrize("word", [None, "", "0", "1"])
def test_words_for_building(setup, monkeypatch, word):
    monkeypatch.setenv("CHTCONV_BUILD_KERNELS", word or "")
    if word is None:
        monkeypatch.delenv("CHTCONV_BUILD_KERNELS")
    assert setup.wanted() == (word or "")


def test_a_compiler_that_fails_is_an_error_of_its_own(setup, tmp_path, monkeypatch):
    for compiler in ("false", str(tmp_path / "none")):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(setup.CompileError, match=compiler):
            setup.build(["a/common.c"], "linux-x86_64", tmp_path, tmp_path / "_native.so")
    assert not (tmp_path / "_native.so").exists()
