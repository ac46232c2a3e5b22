"""The provided recipe: computed step for step, continued bit for bit."""

import multiprocessing
import re
import textwrap

import pytest
import torch
import torchvision
from conftest import ROOT, assert_same_weights, run_script
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms as T
from victim import small_model

import dataset
import training
import vision_transformer
from report.demo import DemoCIFAR10

CPU = torch.device("cpu")
BATCH_SIZE, LR = 16, 1e-3
HISTORY_TABLE = training.read_history.__doc__


def settings(n_epochs, seed=0):
    free = {"batch_size": BATCH_SIZE, "lr": LR, "n_epochs": n_epochs}
    return {"dataset": "DemoCIFAR10", **free, "seed": seed}


def train(n_epochs, seed=0):
    """Train a small model by the recipe; ``seed`` is that of the process before it."""
    torch.manual_seed(seed)
    model = small_model(seed)
    loaders = vision_transformer.make_loaders("data", BATCH_SIZE)
    run = training.Run(settings(n_epochs))
    return vision_transformer.train(model, *loaders, LR, n_epochs, CPU, run), model, run


def plain_loop(n_epochs):
    """The six points of the recipe, and nothing else."""
    model = small_model()
    mean = [0.49139968, 0.48215841, 0.44653091]
    std = [0.24703223, 0.24348513, 0.26158784]
    train_transform = T.Compose(
        [
            T.RandomHorizontalFlip(),
            T.RandomResizedCrop((32, 32), scale=(0.8, 1.0), ratio=(0.9, 1.1)),
            T.ToTensor(),
            T.Normalize(mean, std),
        ]
    )
    val_transform = T.Compose([T.ToTensor(), T.Normalize(mean, std)])
    train_loader = DataLoader(
        DemoCIFAR10("data", train=True, transform=train_transform, download=True),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=4,
    )
    val_loader = DataLoader(
        DemoCIFAR10("data", train=False, transform=val_transform, download=True),
        batch_size=BATCH_SIZE,
        shuffle=False,
        num_workers=4,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    losses, accuracies = [], []
    for _ in range(n_epochs):
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        correct = 0
        with torch.no_grad():
            for images, labels in val_loader:
                correct += (model(images).argmax(dim=1) == labels).sum().item()
        accuracies.append(correct / len(val_loader.dataset))
    return model, losses, accuracies


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_recipe_is_computed_bit_for_bit(demo_data, workplace):
    history, model, _ = train(n_epochs=2)
    expected, losses, accuracies = plain_loop(n_epochs=2)
    assert history["train_losses"] == losses
    assert history["val_accs"] == accuracies
    assert_same_weights(model, expected)
    assert len(losses) == 2 * (100 // BATCH_SIZE)


def test_predictions_disturb_nothing_and_are_without_dropout(demo_data):
    model = small_model(p_dropout=0.9)
    _, loader = vision_transformer.make_loaders("data", BATCH_SIZE)
    state = torch.get_rng_state()
    logits, labels = vision_transformer.predict(model, loader, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert labels.tolist() == loader.dataset.targets
    with torch.no_grad():
        images = torch.cat([images for images, _ in loader])
        torch.testing.assert_close(model.eval()(images), logits)


@pytest.mark.parametrize("stop_at", ["first epoch", "second epoch", "validation"])
def test_an_interrupted_run_ends_where_the_whole_one_does(
    demo_data, workplace, monkeypatch, stop_at
):
    whole, expected, run = train(n_epochs=3)
    for path in run.folder.iterdir():
        path.unlink()

    calls = 0
    last_call = {"first epoch": 2, "second epoch": 9, "validation": 2}[stop_at]
    name = "predict" if stop_at == "validation" else "validate"
    original = getattr(vision_transformer, name)

    def interrupt(*given):
        nonlocal calls
        calls += 1
        if calls == last_call:
            raise KeyboardInterrupt
        return original(*given)

    with monkeypatch.context() as patch:
        if stop_at == "validation":
            patch.setattr(vision_transformer, name, interrupt)
        else:
            note_step = training.Run.note_step
            original = note_step
            patch.setattr(training.Run, "note_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(n_epochs=3)
    # Another process, with other random numbers behind it
    history, model, _ = train(n_epochs=3, seed=1)
    for key in ("train_losses", "val_accs", "val_accs_eval", "val_losses_eval"):
        assert history[key] == whole[key]
    assert_same_weights(model, expected)


def test_a_finished_run_is_loaded_not_repeated(demo_data, workplace, monkeypatch):
    monkeypatch.setattr(vision_transformer, "VisionTransformer", small_model)
    monkeypatch.setattr(dataset, "fetch", lambda *_: None)
    model, history = vision_transformer.train_run(settings(1), "data", CPU)
    monkeypatch.setattr(vision_transformer, "train", None)
    again, same = vision_transformer.train_run(settings(1), "data", CPU)
    assert same == history
    assert_same_weights(again, model)
    torch.manual_seed(0)
    assert not torch.equal(again.head.weight, small_model().head.weight), "it learned"


def test_history_says_what_the_run_was(demo_data, workplace):
    history, _, run = train(n_epochs=1)
    assert training.read_history(run.folder) == history
    documented = re.findall(r"``(\w+)``|^ +(\w+(?:, \w+)*)  ", HISTORY_TABLE, re.M)
    names = {name for pair in documented for name in ",".join(pair).split(",")}
    assert history.keys() <= {name.strip() for name in names}
    assert 0 <= history["val_accs"][0] <= 1
    assert history["versions"]["torch"] == torch.__version__


def test_default_parameters_are_the_recipe():
    v = vision_transformer
    assert (v.DATASET_CACHE_DIR, v.BATCH_SIZE, v.LR, v.N_EPOCHS) == (
        "./data",
        128,
        3e-4,
        50,
    )
    given = {"batch_size": v.BATCH_SIZE, "lr": v.LR, "n_epochs": v.N_EPOCHS}
    assert training.PRESETS["default"] == {"dataset": "CIFAR10", **given, "seed": 0}


def test_training_works_where_workers_are_spawned(workplace):
    script = workplace / "train spawned.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(ROOT)!r})
            import torch
            import report.demo, training, vision_transformer

            if __name__ == "__main__":
                torch.multiprocessing.set_start_method("spawn")
                torch.set_num_threads(1)
                report.demo.SIZES = {{True: 32, False: 10}}
                vision_transformer.CIFAR10 = report.demo.DemoCIFAR10
                torch.manual_seed(0)
                model = vision_transformer.VisionTransformer(
                    layers=1, hidden_size=16, mlp_size=16, n_heads=2
                )
                cpu = torch.device("cpu")
                loaders = vision_transformer.make_loaders("data", 16)
                for loader, number in zip(loaders, (1, 0)):
                    loader.num_workers = number  # each of them loads torch anew
                run = training.Run({{"seed": 0}})
                history = vision_transformer.train(
                    model, *loaders, 1e-3, 1, cpu, run
                )
                print(len(history["train_losses"]), torch.utils.data.get_worker_info())
            """
        ),
        encoding="utf-8",
    )
    done = run_script(script, folder=workplace, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 None"
    assert "spawn" in multiprocessing.get_all_start_methods()


# --- With the real data, where it is -------------------------------------------------

DATA = ROOT / "data"
real_data = pytest.mark.skipif(
    not dataset.is_present(torchvision.datasets.CIFAR10, DATA),
    reason="CIFAR-10 is not in ./data",
)


@real_data
def test_channel_statistics_are_the_constants_of_the_recipe():
    data = torchvision.datasets.CIFAR10(DATA, train=True).data
    normalize = vision_transformer.NORMALIZATION
    assert torch.allclose(
        torch.tensor(data.mean((0, 1, 2)) / 255),
        torch.tensor(normalize.mean).double(),
        atol=1e-6,
    )
    assert torch.allclose(
        torch.tensor(data.std((0, 1, 2)) / 255),
        torch.tensor(normalize.std).double(),
        atol=1e-6,
    )


@real_data
def test_a_few_real_steps_lower_the_loss(workplace):
    torch.manual_seed(0)
    model = vision_transformer.VisionTransformer()
    loader, val_loader = vision_transformer.make_loaders(DATA, batch_size=32)
    loader.num_workers = 0
    batches = [batch for _, batch in zip(range(12), loader, strict=False)]
    some = DataLoader(torch.utils.data.Subset(val_loader.dataset, range(50)), 50)
    run = training.Run({"seed": 0})
    history = vision_transformer.train(model, batches, some, 3e-4, 1, CPU, run)
    losses = history["train_losses"]
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.1
