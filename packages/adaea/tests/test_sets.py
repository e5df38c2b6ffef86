import csv
import json

import numpy as np
import pytest
import torch

from adaea.advset import AdversarialSet
from adaea.images import load_data
from fusion_core.errors import CheckpointError, DataError, InputError, NonFiniteError, ShapeError


def make(count=5, targets=True, eps=8 / 255, channels=3, norm="linf"):
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, channels, 8, 8), generator=draw).float() / 255
    step = 2 * torch.rand(x.shape, generator=draw) - 1
    step = step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1) if norm == "l2" else step
    adv = (x + step * eps).clamp(0, 1)
    labels = torch.arange(count) % 3
    info = {"attack": "AdaEA", "eps": eps, "norm": norm}
    return AdversarialSet(
        adv, labels, x, (labels + 1) % 3 if targets else None, torch.arange(count) * 2, info
    )


def test_a_file_gives_back_everything(tmp_path):
    made = make()
    made.save(tmp_path / "set.safetensors")
    found = AdversarialSet.load(tmp_path / "set.safetensors")
    for name in ("adversarial", "labels", "clean", "targets", "index"):
        assert torch.equal(getattr(found, name), getattr(made, name)), name
    assert found.info == made.info
    assert found.digest() == made.digest()
    assert json.loads((tmp_path / "set.json").read_text())["digest"] == made.digest()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("linf", 0.05), ("l2", 0.7)])
def test_a_folder_of_png_holds_the_rounded_images(tmp_path, norm, eps):
    made = make(norm=norm, eps=eps)
    made.save(tmp_path / "png")
    found = AdversarialSet.load(tmp_path / "png")
    assert torch.equal(found.adversarial, made.rounded().adversarial)
    assert found.index.tolist() == [0, 2, 4, 6, 8]
    assert torch.equal(found.targets, made.targets)
    change = (found.adversarial - made.clean).flatten(1)
    size = change.abs().amax() if norm == "linf" else change.norm(dim=1).max()
    assert float(size) <= eps + 1e-6
    with (tmp_path / "png" / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {"filename": "000002.png", "label": "1", "targeted_label": "2"}


def test_gray_images_and_sets_without_targets(tmp_path):
    made = make(targets=False, channels=1)
    made.save(tmp_path / "png")
    found = AdversarialSet.load(tmp_path / "png")
    assert found.targets is None
    assert found.adversarial.shape == made.adversarial.shape


@pytest.mark.parametrize("eps", ["x", None, True, -0.1, float("nan"), [0.1], 1e308])
def test_a_set_of_no_radius_is_refused(eps, tmp_path):
    with pytest.raises(DataError, match=r"eps is .*, wanted a number >= 0 such as 8/255"):
        AdversarialSet(torch.zeros(1, 3, 4, 4), torch.zeros(1).long(), info={"eps": eps})
    make().save(tmp_path / "png")
    record = json.loads((tmp_path / "png" / "set.json").read_text())
    record["info"]["eps"] = eps
    (tmp_path / "png" / "set.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"set\.json: .*eps is"):
        AdversarialSet.load(tmp_path / "png")


def test_a_changed_file_is_noticed(tmp_path):
    made = make()
    made.save(tmp_path / "set.safetensors")
    data = bytearray((tmp_path / "set.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "set.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="does not have the digest"):
        AdversarialSet.load(tmp_path / "set.safetensors")
    (tmp_path / "set.safetensors").write_bytes(data[:200])
    with pytest.raises(CheckpointError):
        AdversarialSet.load(tmp_path / "set.safetensors")
    made.save(tmp_path / "png")
    make(eps=0.0).save(tmp_path / "other")
    (tmp_path / "other" / "000002.png").replace(tmp_path / "png" / "000002.png")
    with pytest.raises(CheckpointError, match="does not have the digest"):
        AdversarialSet.load(tmp_path / "png")
    (tmp_path / "png" / "set.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        AdversarialSet.load(tmp_path / "png")


def test_what_is_no_set(tmp_path):
    with pytest.raises(CheckpointError):
        AdversarialSet.load(tmp_path / "missing.safetensors")
    from fusion_core.checkpoint import save_tensors

    save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no adversarial set"):
        AdversarialSet.load(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"wanted NAME\.safetensors"):
        make().save(tmp_path / "set.pt")
    with pytest.raises(InputError, match="not empty"):
        make().save(tmp_path)
    with pytest.raises(DataError, match="no clean images"):
        AdversarialSet(torch.zeros(1, 3, 4, 4), torch.zeros(1).long(), info={"eps": 0.1}).save(
            tmp_path / "png"
        )
    with pytest.raises(DataError, match="does not say its eps"):
        AdversarialSet(torch.zeros(1, 3, 4, 4), torch.zeros(1).long(), torch.zeros(1, 3, 4, 4)).rounded()
    with pytest.raises(DataError, match="2 channels"):
        make(channels=2).save(tmp_path / "png")
    assert not (tmp_path / "png").exists()


def test_shapes_are_checked():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ShapeError, match="adversarial has shape"):
        AdversarialSet(x[0], torch.zeros(2).long())
    with pytest.raises(ShapeError, match="labels has shape"):
        AdversarialSet(x, torch.zeros(3).long())
    with pytest.raises(ShapeError, match="clean has shape"):
        AdversarialSet(x, torch.zeros(2).long(), x[:1])


def test_data_from_folders_of_classes(tmp_path):
    from PIL import Image

    draw = np.random.default_rng(0)
    for name in ("b_second", "a_first"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(draw.integers(0, 256, (6, 7, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "a_first" / "notes.txt").write_text("no image")
    images, labels = load_data(tmp_path)
    assert images.shape == (6, 3, 6, 7)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert load_data(tmp_path, 2)[1].tolist() == [0, 1]
    assert load_data(str(tmp_path), size=5)[0].shape == (6, 3, 5, 5)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "a_first" / "odd.png")
    with pytest.raises(DataError, match=r"a_first/0\.png has 7x6 pixels, a_first/odd\.png 9x9; pass size"):
        load_data(tmp_path)
    Image.fromarray(np.zeros((6, 7), np.uint8)).save(tmp_path / "a_first" / "odd.png")
    with pytest.raises(DataError, match=r"0\.png has 3 channels, a_first/odd\.png 1 channels; wanted all"):
        load_data(tmp_path)
    (tmp_path / "a_first" / "odd.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"odd\.png cannot be read as an image"):
        load_data(tmp_path)


def test_data_from_files(tmp_path):
    made = make()
    np.savez(
        tmp_path / "d.npz", images=(made.clean * 255).to(torch.uint8).numpy(), labels=made.labels.numpy()
    )
    images, labels = load_data(tmp_path / "d.npz", 4)
    torch.testing.assert_close(images, made.clean[:4])
    assert labels.tolist() == [0, 1, 2, 0]
    made.save(tmp_path / "s.safetensors")
    assert torch.equal(load_data(tmp_path / "s.safetensors")[0], made.clean)
    np.savez(tmp_path / "bad.npz", pictures=np.zeros(3))
    with pytest.raises(DataError, match="lacks"):
        load_data(tmp_path / "bad.npz")
    pixels = np.zeros((2, 3, 4, 4), np.float32)
    np.savez(tmp_path / "wide.npz", images=pixels, labels=np.array([0, 1], np.uint64))
    assert load_data(tmp_path / "wide.npz")[1].tolist() == [0, 1]
    np.savez(tmp_path / "minus.npz", images=pixels, labels=np.array([0, -1]))
    with pytest.raises(DataError, match=r"minus\.npz: labels holds -1, wanted class indices >= 0"):
        load_data(tmp_path / "minus.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="cannot be read"):
        load_data(tmp_path / "cut.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_data(tmp_path / "empty")
    (tmp_path / "empty" / "labels.csv").write_text("name,label\nx.png,1\n")
    with pytest.raises(DataError, match="wanted filename and label"):
        load_data(tmp_path / "empty")
    for label in ("one", "-1", "9" * 20):
        (tmp_path / "empty" / "labels.csv").write_text(f"filename,label\nx.png,{label}\n")
        with pytest.raises(DataError, match=rf"label of x\.png is '{label}', wanted 0 to 2147483647"):
            load_data(tmp_path / "empty")


def test_data_from_loaders_and_tensors():
    made = make()
    dataset = torch.utils.data.TensorDataset(made.clean, made.labels)
    images, _ = load_data(torch.utils.data.DataLoader(dataset, batch_size=2), limit=3)
    assert torch.equal(images, made.clean[:3])
    assert torch.equal(load_data((made.clean.numpy(), made.labels.numpy()))[1], made.labels)
    assert load_data("zoo:scenes", 7)[0].shape == (7, 3, 32, 32)


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (3, InputError, "data is a int"),
        ("nowhere/at/all", InputError, "wanted a folder of images"),
        ([], InputError, "no images"),
        ([3], InputError, "wanted batches"),
        ((torch.zeros(2, 3, 4), torch.zeros(2).long()), ShapeError, "images has shape"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(3).long()), ShapeError, "one per image"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2)), DataError, "integer type"),
        ((torch.zeros(2, 3, 4, 4), torch.tensor([0, -1])), DataError, "holds -1"),
        ((torch.zeros(2, 3, 4, 4).int(), torch.zeros(2).long()), DataError, "wanted floats"),
        (
            (torch.full((1, 3, 4, 4), 1.5), torch.zeros(1).long()),
            DataError,
            r"un-normalized images, give mean",
        ),
        ((torch.full((1, 3, 4, 4), float("nan")), torch.zeros(1).long()), NonFiniteError, "non-finite"),
        ((torch.zeros(0, 3, 4, 4), torch.zeros(0).long()), InputError, "no images"),
    ],
)
def test_bad_data_is_named(data, kind, words):
    with pytest.raises(kind, match=words):
        load_data(data)
    with pytest.raises(InputError, match="limit is 0"):
        load_data(data, 0)
