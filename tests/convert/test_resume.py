"""Kills, full disks, and parts of an array job: in the end, the same bytes as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from made_images import class_folders, encoded, photos, pixels

from pipelines.convert import conversion, journal
from pipelines.convert.command import main
from pipelines.convert.conversion import ConvertOptions, OutputOptions, Settings, convert
from pipelines.convert.journal import RECORD, Journal
from pipelines.convert.merge import differing, merge
from pipelines.errors import InputError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def many(root, count=150):
    """JPEGs to be kept and to be shrunk, PNGs, and damaged files."""
    files = {f"c{i % 4}/{i:04}.jpg": encoded(pixels(40 + i % 40, 50, i), quality=90) for i in range(count)}
    files |= {f"c1/p{i}.png": encoded(pixels(20, 30, i), "PNG") for i in range(8)}
    files |= {f"c2/bad{i}.jpg": files["c0/0000.jpg"][: 200 + i] for i in range(5)}
    return class_folders(root, files)


def kill(tmp_path, kills, seed, images=150):
    many(tmp_path / "set", images)
    (tmp_path / "out").mkdir()
    command = [sys.executable, HERE / "kill_conversions.py", tmp_path / "set", tmp_path / "out", kills, seed]
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_and_resumed_it_ends_with_the_same_bytes(tmp_path):
    result = kill(tmp_path, 6, seed=1, images=100)
    assert result["kills"] >= 6 and result["resumed"] > 0


@pytest.mark.slow
def test_200_kills(tmp_path):
    result = kill(tmp_path, 200, seed=2)
    print(result)
    assert result["kills"] >= 200 and result["resumed"] > result["trials"] / 3


def everything(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


class Stop(Exception):
    pass


@pytest.mark.parametrize("step", ["finish", "publish", "replace"])
def test_stopped_at_the_end_it_is_finished_later(tmp_path, monkeypatch, step):
    """Between the last image and the last rename: nothing is lost, and nothing is asked to be overwritten."""
    photos(tmp_path / "set")
    options = ConvertOptions(webdataset=tmp_path / "out/tars")
    convert(str(tmp_path / "set"), tmp_path / "out/x.beton", options=options)
    expected = everything(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(conversion, "KEEP_SECONDS", 0)
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == (2 if step == "replace" else 1):
            raise Stop
        return real(*_)

    if step == "replace":
        real = os.replace
        monkeypatch.setattr(os, "replace", stop)
    else:
        real = getattr(conversion, f"_{step}")
        monkeypatch.setattr(conversion, f"_{step}", stop)
    with pytest.raises(Stop):
        convert(str(tmp_path / "set"), tmp_path / "out/x.beton", options=options)
    monkeypatch.undo()
    assert everything(tmp_path / "out") != expected
    convert(str(tmp_path / "set"), tmp_path / "out/x.beton", options=options)
    assert everything(tmp_path / "out") == expected


def test_images_are_on_the_disk_before_the_journal_says_so(tmp_path, monkeypatch):
    photos(tmp_path / "set")
    book, part = tmp_path / "out/.x.beton.journal", str(tmp_path / "out/.x.beton.part")
    synced, fdatasync = [], os.fdatasync

    def noting(number: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{number}"), book.stat().st_size))
        fdatasync(number)

    monkeypatch.setattr(os, "fdatasync", noting)
    monkeypatch.setattr(conversion, "COMMIT_SECONDS", 0)
    count = convert(str(tmp_path / "set"), tmp_path / "out/x.beton")["count"]
    assert len(synced) > 2 * count and {name for name, _ in synced} == {part, str(book)}
    for (name, before), (after, size) in pairwise(synced):
        if name == part:  # the group about these images is written only now
            assert after == str(book) and size > before
        elif after == part:
            assert size == before


def test_what_the_estimate_takes_is_no_work_to_be_kept(tmp_path, monkeypatch):
    photos(tmp_path / "set")
    clock, estimates = time.perf_counter, []

    def measure(*arguments, **options):
        estimates.append(real(*arguments, **options))
        monkeypatch.setattr(time, "perf_counter", lambda: clock() + 2 * conversion.KEEP_SECONDS)
        return estimates[0]

    real = conversion.measure
    monkeypatch.setattr(conversion, "measure", measure)
    monkeypatch.setattr(conversion, "KEEP_SECONDS", 60.0)
    monkeypatch.setattr(conversion, "_convert_images", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        convert(str(tmp_path / "set"), tmp_path / "out/x.beton")
    assert estimates and [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_unfinished_conversion_of_something_else_is_not_touched(tmp_path, monkeypatch, capsys):
    photos(tmp_path / "set")
    monkeypatch.setattr(conversion, "KEEP_SECONDS", 0)
    monkeypatch.setattr(conversion, "_finish", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        convert(str(tmp_path / "set"), tmp_path / "out/x.beton")
    monkeypatch.undo()
    before = everything(tmp_path / "out")
    typed = [str(tmp_path / "set"), str(tmp_path / "out/x.beton")]
    for option in ("--jpeg-quality", "--subset"):
        assert main([*typed, option, "5"]) == 2
        assert (
            "an unfinished conversion from another source or with other settings" in capsys.readouterr().err
        )
        assert everything(tmp_path / "out") == before
    typed += ["--subset", "5"]
    assert main([*typed, "--restart"]) == 0
    assert sorted(everything(tmp_path / "out")) == ["x.beton", "x.beton.json"]


def test_two_at_once_are_refused(tmp_path):
    photos(tmp_path / "set")
    path = tmp_path / ".x.beton.journal"
    held = Journal(path, "whatever")
    with pytest.raises(InputError, match="another process is converting to the same file"):
        convert(str(tmp_path / "set"), tmp_path / "x.beton")
    held.close()


def test_a_journal_cut_or_damaged_anywhere_is_read_up_to_there(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, "this one")
    records = np.zeros(12, RECORD)
    records["size"] = np.arange(12)
    for i, record in enumerate(records):
        journal.append(record.item(), "a reason" if i % 5 == 0 else None)
        if i % 4 == 3:
            journal.commit([], wait=True)
    journal.close()
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal(path, "this one")
        assert journal.count in (0, 4, 8) and [
            int(record["size"]) for some in journal.records(3) for record in some
        ] == list(range(journal.count))
        assert all(place < journal.count for place in journal.reasons)
        journal.close()
    for place in range(len(b"this one\n"), len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        journal = Journal(path, "this one")
        assert journal.count < 12 and [
            int(record["size"]) for some in journal.records(3) for record in some
        ] == list(range(journal.count))
        journal.close()


# ------------------------------------------------------------------- the disk


LIMITED = (
    "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
    "from pipelines.convert import conversion; conversion.KEEP_SECONDS = 0; conversion.COMMIT_SECONDS = 0.0;"
    "from pipelines.convert.command import main; sys.exit(main(sys.argv[1:]))"
)


def test_a_write_that_fails_keeps_what_was_done(tmp_path):
    many(tmp_path / "set")
    convert(str(tmp_path / "set"), tmp_path / "reference.beton")
    out = tmp_path / "out/x.beton"
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "set"), str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot be written (File too large); " in done.stderr and "of 163 images are kept" in done.stderr
    assert not out.exists()
    manifest = convert(str(tmp_path / "set"), out)
    assert 0 < manifest["resumed"] < 163
    assert out.read_bytes() == (tmp_path / "reference.beton").read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.beton", "x.beton.json"]


@pytest.mark.parametrize("small_disk", [40], indirect=True)  # 8 MB more than a conversion leaves free
def test_no_space_left_before_and_during(tmp_path, small_disk, capsys, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    data = encoded(noise, quality=95)
    rows = "".join("a.jpg,0\n" for _ in range(1 + 60_000_000 // len(data)))
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "x.csv").write_text("path,label\n" + rows)
    assert main([str(tmp_path / "x.csv"), str(small_disk / "x.beton")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "are needed, " in error and "convert to another disk" in error
    assert list(small_disk.iterdir()) == []

    monkeypatch.setattr(conversion, "check_space", lambda *_: None)  # something else fills it meanwhile
    monkeypatch.setattr(conversion, "KEEP_SECONDS", 0)
    monkeypatch.setattr(conversion, "COMMIT_SECONDS", 0)
    assert main([str(tmp_path / "x.csv"), str(small_disk / "x.beton")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        "no space left on the disk; " in error
        and "are kept: free some space and run the command again" in error
    )


@pytest.mark.parametrize("tars", [False, True], ids=["beton", "tars"])
@pytest.mark.parametrize("filled_at", [0, 1, 3, -1])
def test_a_disk_that_is_full_when_the_journal_is_written(
    tmp_path, small_disk, fill, capsys, monkeypatch, filled_at, tars
):
    """Before its first line, at a commit, at the last. Once there is room, it ends with the same bytes."""
    source, out, real = str(many(tmp_path / "set")), small_disk / ("x" if tars else "x.beton"), Journal._write
    for name, value in (("KEEP_SECONDS", 0), ("COMMIT_SECONDS", 0), ("RESERVE", 0)):
        monkeypatch.setattr(conversion, name, value)
    monkeypatch.setattr(conversion, "check_space", lambda *_: None)
    calls = []

    def write(journal, files, group):
        calls.append(group)
        complete = group[12]  # of its head
        if not (small_disk / "ballast").exists() and (complete if filled_at < 0 else len(calls) == filled_at):
            fill()
            group += bytes(8192)  # beyond what its last page has room for
        real(journal, files, group)

    monkeypatch.setattr(Journal, "_write", write)
    if filled_at == 0:
        fill()
    typed = [source, *(["--webdataset"] if tars else []), str(out), "--workers", "1"]
    assert main(typed) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {out}: no space left on the disk; ")
    kept = "are kept: free some space and run the command again"
    assert error.endswith("nothing was written" if filled_at == 0 else kept)
    (small_disk / "ballast").unlink()
    monkeypatch.setattr(Journal, "_write", real)
    assert main(typed) == 0
    reference = tmp_path / "reference" / out.name
    assert main([*typed[:-3], str(reference), *typed[-2:]]) == 0
    files = [sorted(each.glob("*.tar")) if tars else [each] for each in (out, reference)]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_a_disk_too_small_is_known_before(tmp_path, capsys):
    """A table that names one image so often that the disk could not hold it."""
    (tmp_path / "a.ppm").write_bytes(encoded(np.zeros((1200, 1200, 3), np.uint8), "PPM"))
    rows = 1000 + int(1.3 * shutil.disk_usage(tmp_path).free) // (3 * 1200 * 1200)
    (tmp_path / "x.csv").write_text("path,label\n" + "a.ppm,0\n" * rows)
    options = ["--raw-proportion", "1"]
    assert main([str(tmp_path / "x.csv"), str(tmp_path / "out/x.beton"), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "B are needed, " in error and "convert to another disk" in error
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------- the parts


@pytest.mark.parametrize("settings", [Settings(), Settings(shuffle_seed=3, subset=90, max_resolution=60)])
def test_parts_merge_to_the_same_bytes(tmp_path, settings):
    source = str(many(tmp_path / "set"))
    convert(
        source,
        tmp_path / "one/x.beton",
        settings,
        options=ConvertOptions(webdataset=tmp_path / "one/tars", images_per_tar=37),
    )
    for number in (2, 3, 1, 4):
        convert(source, tmp_path / "parts/x.beton", settings, options=ConvertOptions(shard=(number, 4)))
    merge(
        tmp_path / "parts/x.beton",
        options=OutputOptions(webdataset=tmp_path / "parts/tars", images_per_tar=37),
    )
    assert len(list((tmp_path / "parts").glob("x.part-*-of-004.beton"))) == 4
    found = {n: d for n, d in everything(tmp_path / "parts").items() if ".part-" not in n}
    expected = everything(tmp_path / "one")
    assert sorted(found) == sorted(expected)
    assert all(found[name] == expected[name] for name in expected)


def test_the_command_says_that_parts_are_left_or_removes_them(tmp_path, capsys):
    source, out = str(photos(tmp_path / "set")), str(tmp_path / "x.beton")
    for number in (1, 2):
        convert(source, out, options=ConvertOptions(shard=(number, 2)))
    assert main(["--merge", out]) == 0
    assert "its 2 parts (" in (printed := capsys.readouterr().out) and "--remove-parts" in printed
    assert main(["--merge", out, "--overwrite", "--remove-parts"]) == 0
    assert "parts" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "x.beton", "x.beton.json"]
    with pytest.raises(SystemExit):
        main([source, out, "--remove-parts"])


def test_a_setting_that_one_part_lacks_is_named():
    assert differing({"a": 1, "b": None}, {"a": 1}) == " (b: None, there not given)"
    assert differing({"a": 1}, {"a": 2}) == " (a: 1, there 2)" and differing([1], [2]) == ""


def test_parts_that_do_not_belong_together(tmp_path, capsys):
    source = str(photos(tmp_path / "set"))
    out = tmp_path / "x.beton"
    with pytest.raises(InputError, match="no parts next to it"):
        merge(out)
    convert(source, out, options=ConvertOptions(shard=(1, 3)))
    convert(source, out, options=ConvertOptions(shard=(3, 3)))
    with pytest.raises(InputError, match="1 of 3 parts are missing: .*002-of-003"):
        merge(out)
    convert(source, out, Settings(shuffle_seed=1), options=ConvertOptions(shard=(2, 3)))
    with pytest.raises(
        InputError, match=r"part-002-of-003.beton: its settings \(shuffle_seed: 1, there None\) differs"
    ):
        merge(out)
    convert(source, out, options=ConvertOptions(shard=(2, 3), overwrite=True))
    path = tmp_path / "x.part-002-of-003.beton"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"image \d \(class1/\d+.jpg\) isn't what was written"):
        merge(out)
    assert not out.exists()
    convert(source, out, options=ConvertOptions(shard=(2, 3), overwrite=True))
    convert(source, out, options=ConvertOptions(shard=(1, 2)))
    with pytest.raises(InputError, match="its parts are of 002 and 003"):
        merge(out)
    for shard, message in (
        ("0/3", "K must be within 1 and N"),
        ("13/13", "N at most 12"),
        ("x", "is not K/N"),
    ):
        with pytest.raises(SystemExit) if shard == "x" else pytest.raises(InputError, match=message):
            main([source, str(out), "--shard", shard]) if shard == "x" else convert(
                source, out, options=ConvertOptions(shard=tuple(map(int, shard.split("/"))))
            )


def test_interrupted_by_the_keyboard_it_says_how_to_go_on(tmp_path):
    many(tmp_path / "set", 600)
    code = (
        "import sys; from pipelines.convert import conversion;"
        "conversion.KEEP_SECONDS = 0; conversion.COMMIT_SECONDS = 0.01;"
        "from pipelines.convert.command import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "set", "out/x.beton", "--max-resolution", "39", "--workers", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job is deaf to it
    )
    journal = tmp_path / "out/.x.beton.journal"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 20_000):
        pass
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "of 613 images are kept; run the same command again to resume" in errors.splitlines()[-1]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "of them earlier" in done.stdout


# ------------------------------------------------------------------- two processes


def started(source, out, *options):
    """A conversion by another process, stopped in its midst; None if it has ended before."""
    command = [sys.executable, "-m", "pipelines.convert.command", source, out, "--workers", "1", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    part = out.with_name(f".{out.name}.part")
    while not part.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    return process


@pytest.fixture
def slow_set(tmp_path):
    """PNGs that take a moment each, so that a conversion can be stopped in its midst."""
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    files = {f"a/{i:02}.png": encoded(np.roll(noise, i, 0), "PNG", compress_level=1) for i in range(40)}
    return class_folders(tmp_path / "set", files)


def test_restart_leaves_a_running_conversion_alone(tmp_path, slow_set, capsys):
    out = tmp_path / "x.beton"
    first = started(slow_set, out, "--webdataset", tmp_path / "tars")
    assert first.poll() is None
    typed = [str(slow_set), str(out), "--webdataset", str(tmp_path / "tars")]
    for options in (["--restart"], ["--restart", "--overwrite"], []):
        before = everything(tmp_path)
        assert main([*typed, *options]) == 2
        assert "another process is converting to the same file" in capsys.readouterr().err
        assert everything(tmp_path) == before
    first.send_signal(signal.SIGCONT)
    said, error = first.communicate()
    assert first.returncode == 0 and "40 images" in said, error
    convert(str(slow_set), tmp_path / "again.beton")
    assert out.read_bytes() == (tmp_path / "again.beton").read_bytes()


@pytest.mark.parametrize("what", ["overwritten", "removed", "tar"])
def test_a_file_that_another_process_has_changed_is_not_published(tmp_path, slow_set, what):
    """As on a file system without locks: the journal knows what should be there."""
    out = tmp_path / "x.beton"
    first = started(slow_set, out, "--webdataset", tmp_path / "tars", "--images-per-tar", 10)
    assert first.poll() is None
    part, tars = tmp_path / ".x.beton.part", tmp_path / ".tars.part"
    first.send_signal(signal.SIGCONT)
    while len(list(tars.glob("*.tar"))) < 3 and first.poll() is None:
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    if what == "overwritten":
        with open(part, "r+b") as file:
            file.seek(4000)
            file.write(bytes(10_000))
    elif what == "removed":
        part.unlink()
    else:
        with open(tars / "images-000000.tar", "r+b") as file:
            file.seek(2000)
            file.write(bytes(1000))
    first.send_signal(signal.SIGCONT)
    error = first.communicate()[1]
    assert first.returncode == 2 and "another process has changed it" in error and "--restart" in error
    assert not out.exists() and not (tmp_path / "tars").exists()


def test_labels_that_were_corrected_since_begin_another_conversion(tmp_path, monkeypatch):
    names = [path.relative_to(tmp_path) for path in sorted(photos(tmp_path / "set").rglob("*.jpg"))]
    for swapped in (False, True):
        labels = [(n + swapped) % 2 for n in range(len(names))]
        rows = (f"{name},{label}\n" for name, label in zip(names, labels))
        (tmp_path / "table.csv").write_text("path,label\n" + "".join(rows))
        with monkeypatch.context() as patch:
            patch.setattr(conversion, "KEEP_SECONDS", 0)
            patch.setattr(conversion, "_finish", lambda *_: (_ for _ in ()).throw(Stop))
            with pytest.raises(InputError if swapped else Stop):
                convert(str(tmp_path / "table.csv"), tmp_path / "x.beton")


@pytest.fixture
def interruptible():
    """A process that a shell has started in the background ignores Ctrl-C, and pytest with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("after", ["open_alone", "Journal"])
def test_interrupted_while_its_journal_is_opened_it_leaves_nothing(tmp_path, monkeypatch, after):
    """Ctrl-C when the file is there, and before the conversion knows of it."""
    photos(tmp_path / "set", classes=1, each=3)
    (tmp_path / "out").mkdir()
    module = conversion if after == "Journal" else journal
    opened = getattr(module, after)

    def interrupted(*arguments):
        made = opened(*arguments)
        signal.raise_signal(signal.SIGINT)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(module, after, interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(str(tmp_path / "set"), tmp_path / "out/x.beton")
    assert list((tmp_path / "out").iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert convert(str(tmp_path / "set"), tmp_path / "out/x.beton")["count"] == 3
