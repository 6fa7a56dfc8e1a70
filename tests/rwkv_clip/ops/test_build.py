"""The build script, on sources small enough to compile in a second."""

import ctypes
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rwkv_clip import _build
from rwkv_clip.ops import _library


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "answer.cpp").write_text(
        '#pragma GCC visibility push(default)\nextern "C" int answer() { return 42; }\n'
    )
    monkeypatch.setattr(_build, "SOURCES", folder)
    monkeypatch.delenv("RWKV_CLIP_CUDA", raising=False)
    return folder


def answer(library: Path) -> int:
    result: int = ctypes.CDLL(str(library)).answer()
    return result


def test_a_library_is_built_and_put_in_place(sources, tmp_path):
    library = _build.build(tmp_path / "out", cuda=False)
    assert library == tmp_path / "out" / "_C.so"
    assert answer(library) == 42
    assert [path.name for path in library.parent.iterdir()] == ["_C.so"]


def test_files_named_for_an_instruction_set_get_it(sources, tmp_path):
    (sources / "wide_avx2.cpp").write_text(
        "#if defined(__x86_64__) && !defined(__AVX2__)\n#error no AVX2\n#endif\n"
    )
    assert _build.build(tmp_path / "out", cuda=False).is_file()


def test_a_compile_that_fails_says_what_the_compiler_said_and_keeps_the_old_library(
    sources, tmp_path
):
    library = _build.build(tmp_path / "out", cuda=False)
    before = library.read_bytes()
    (sources / "broken.cpp").write_text("this is not C++\n")
    with pytest.raises(_build.BuildError, match=r"broken\.cpp"):
        _build.build(tmp_path / "out", cuda=False)
    assert library.read_bytes() == before
    assert [path.name for path in library.parent.iterdir()] == ["_C.so"]


def test_what_is_compiled_is_shown_and_a_failure_stands_alone(sources, tmp_path, capsys):
    (sources / "a_warning.cpp").write_text("#warning of no interest\n")
    (sources / "broken.cpp").write_text("this is not C++\n")
    with pytest.raises(_build.BuildError) as failed:
        _build.build(tmp_path / "out", cuda=False, work_dir=tmp_path / "work")
    assert "compile broken.cpp.o" in capsys.readouterr().out
    assert "this is not" in str(failed.value)
    assert "of no interest" not in str(failed.value)


def test_two_builds_at_once_both_end_well(sources, tmp_path):
    built = []
    work = tmp_path / "work"
    builders = [
        threading.Thread(
            target=lambda: built.append(_build.build(tmp_path / "out", cuda=False, work_dir=work))
        )
        for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(built) == 2
    assert answer(built[0]) == 42


def test_folders_with_spaces_are_fine(sources, tmp_path, monkeypatch):
    spaced = tmp_path / "my sources"
    sources.rename(spaced)
    monkeypatch.setattr(_build, "SOURCES", spaced)
    assert answer(_build.build(tmp_path / "the output", cuda=False)) == 42


def test_missing_sources_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(_build, "SOURCES", tmp_path / "csrc")
    with pytest.raises(_build.BuildError, match="csrc"):
        _build.build(tmp_path)


def test_missing_tools_are_told(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(_build.BuildError, match=r"no C\+\+ compiler"):
        _build.build(tmp_path)


def test_cuda_without_its_compiler_is_refused(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(_build, "find_nvcc", lambda: None)
    with pytest.raises(_build.BuildError, match="CUDA_HOME"):
        _build.build(tmp_path, cuda=True)
    monkeypatch.setenv("RWKV_CLIP_CUDA", "1")
    with pytest.raises(_build.BuildError, match="CUDA_HOME"):
        _build.build(tmp_path)


def test_a_strange_setting_is_refused(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_CLIP_CUDA", "yes")
    with pytest.raises(_build.BuildError, match=r"RWKV_CLIP_CUDA is 'yes'.*0.*1"):
        _build.build(tmp_path)


def test_a_strange_choice_of_the_library_is_refused(monkeypatch):
    monkeypatch.setenv("RWKV_CLIP_NO_LIBRARY", "true")
    with pytest.raises(ImportError, match=r"RWKV_CLIP_NO_LIBRARY is 'true'.*0.*1"):
        _library._is_left_alone()


def test_a_strange_instruction_set_is_refused_at_import_and_told_by_the_doctor():
    program = "from rwkv_clip import doctor; print(doctor.table(doctor.examine()))"
    environment = os.environ | {"RWKV_CLIP_ISA": "sse9"}
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert "RWKV_CLIP_ISA is 'sse9'; it takes portable, avx2, avx512" in answer.stdout


def test_nvcc_is_told_the_compiler_alone_and_not_what_starts_it():
    nvcc = _build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not found")
    flags = _build._nvcc_flags("ccache /usr/bin/g++ -m64", nvcc)
    assert flags[flags.index("-ccbin") + 1] == "/usr/bin/g++"


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("machine", "folder", "top"),
    [
        ("x86_64", "lib64", ""),
        ("x86_64", "lib/x86_64-linux-gnu", ""),  # of Debian and Ubuntu
        ("aarch64", "lib/aarch64-linux-gnu", ""),
        ("aarch64", "targets/sbsa-linux/lib", ""),
        ("x86_64", "lib/x86_64-linux-gnu", "lib/nvidia-cuda-toolkit"),  # the linker knows it
    ],
)
def test_the_cuda_runtime_is_found(machine, folder, top, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    runtime = tmp_path / folder / "libcudart_static.a"
    runtime.parent.mkdir(parents=True)
    runtime.touch()
    nvcc = script(tmp_path / "bin" / "nvcc", f"echo '#$ TOP={tmp_path / top}' >&2" if top else "")
    cxx = script(tmp_path / "bin" / "c++", f'[ "$1" = -m64 ] && echo {runtime}' if top else "")
    assert _build._cuda_libraries(nvcc, f"{cxx} -m64") == runtime.parent


def test_a_cuda_runtime_that_is_nowhere_is_told_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "libcudart_static.a").touch()
    monkeypatch.chdir(tmp_path)  # a compiler that finds nothing repeats the name
    nvcc = script(tmp_path / "usr" / "bin" / "nvcc", "")
    cxx = script(tmp_path / "usr" / "bin" / "c++", "echo libcudart_static.a")
    with pytest.raises(_build.BuildError, match=r"not under .*/usr: .*RWKV_CLIP_CUDA=0"):
        _build._cuda_libraries(nvcc, cxx)
