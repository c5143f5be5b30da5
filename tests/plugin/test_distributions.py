"""Entry points of installed distributions: the same as importlib.metadata lists."""

import importlib.metadata
import sys
import zipfile

import pytest

from tuneforge.plugin.distributions import InstalledEntryPoint, read_entry_points

POINTS = "[tuneforge.callback]\n# a comment\nplain = some_package:Callback\nextra=some_package.deep:A.B [more]\n"
POINT = InstalledEntryPoint("tuneforge.callback", "plain", "some_package:Callback", "Some.Name", "1.2")


def metadata(name, version="1.2"):
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nName: of the description\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def install(folder, points=POINTS, name="Some.Name", file="METADATA", version="1.2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "entry_points.txt").write_bytes(points if isinstance(points, bytes) else points.encode())
        (tmp_path / folder / file).write_text(metadata(name, version))

    return install


def test_every_entry_point_that_importlib_metadata_lists_is_found():
    expected = {
        (point.group, point.name, point.value.partition(" [")[0], each.name, each.version)
        for each in importlib.metadata.distributions()
        for point in each.entry_points
        if point.group.startswith(("tuneforge.", "console_scripts"))
    }
    found = {tuple(each) for prefix in ("tuneforge.", "console_scripts") for each in read_entry_points(prefix)}
    assert len(expected) > 50
    assert found == expected


@pytest.mark.parametrize(("folder", "file"), [("a-1.2.dist-info", "METADATA"), ("a.egg-info", "PKG-INFO")])
def test_a_distribution_in_a_folder_is_read(site, folder, file):
    site(folder, file=file)
    assert list(read_entry_points("tuneforge.")) == [
        POINT,
        POINT._replace(name="extra", target="some_package.deep:A.B"),
    ]
    assert list(read_entry_points("tuneforge.command")) == []


def test_a_distribution_in_a_zip_archive_is_read(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("a-1.2.dist-info/entry_points.txt", POINTS)
        archive.writestr("a-1.2.dist-info/METADATA", metadata("Some.Name"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "all.zip")])
    assert next(read_entry_points("tuneforge.")) == POINT


def test_a_broken_distribution_hides_no_other(site, tmp_path):
    site("a-1.dist-info", points=b"\xff tuneforge.")
    (tmp_path / "b-1.dist-info").mkdir()
    (tmp_path / "c-1.dist-info").mkdir()
    (tmp_path / "c-1.dist-info" / "entry_points.txt").write_text(POINTS)
    site("d-1.dist-info")
    assert next(read_entry_points("tuneforge.")) == POINT


def test_an_earlier_folder_of_the_path_hides_a_later_one(site, tmp_path, monkeypatch):
    site("a-1.2.dist-info")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "earlier"), str(tmp_path), str(tmp_path / "missing")])
    (tmp_path / "earlier" / "a-2.dist-info").mkdir(parents=True)
    (tmp_path / "earlier" / "a-2.dist-info" / "entry_points.txt").write_text(POINTS)
    (tmp_path / "earlier" / "a-2.dist-info" / "METADATA").write_text(metadata("Some.Name", "2"))
    assert {each.version for each in read_entry_points("tuneforge.")} == {"2"}
