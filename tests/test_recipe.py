"""The provided recipe: computed step for step, continued bit for bit."""

import multiprocessing
import textwrap

import pytest
import torch
import torchvision
from conftest import ROOT, assert_same_weights, run_script, small_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms as T

import training
import vision_transformer
from report.demo import DemoCIFAR10

CPU = torch.device("cpu")
BATCH_SIZE, LR = 16, 1e-3


def make_run(n_epochs, seed=0):
    return training.Run("DemoCIFAR10", BATCH_SIZE, LR, n_epochs, seed, CPU)


def train(run, seed=0):
    model = small_model(seed)
    vision_transformer.train(model, run, "data", BATCH_SIZE, LR, CPU)
    return model


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
    run = make_run(n_epochs=2)
    model = train(run)
    expected, losses, accuracies = plain_loop(n_epochs=2)
    assert run.history["train_losses"] == losses
    assert run.history["val_accs"] == accuracies
    assert_same_weights(model, expected)
    assert len(losses) == 2 * (100 // BATCH_SIZE)


def test_eval_accuracy_disturbs_nothing_and_is_without_dropout(demo_data):
    model = small_model(p_dropout=0.9)
    _, loader = vision_transformer.make_loaders("data", BATCH_SIZE)
    state = torch.get_rng_state()
    accuracies = {vision_transformer.validate_in_eval_mode(model, loader, CPU)}
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert torch.get_float32_matmul_precision() == "highest"
    accuracies.add(vision_transformer.validate_in_eval_mode(model, loader, CPU))
    assert len(accuracies) == 1
    logits, labels = vision_transformer.predict(model, loader, CPU)
    with torch.no_grad():
        images = torch.cat([images for images, _ in loader])
        torch.testing.assert_close(model.eval()(images), logits)
    assert labels.tolist() == loader.dataset.targets


@pytest.mark.parametrize("stop_at", ["first epoch", "second epoch", "validation"])
def test_an_interrupted_run_ends_where_the_whole_one_does(
    demo_data, workplace, monkeypatch, stop_at
):
    whole = make_run(n_epochs=3, seed=0)
    expected = train(whole)
    for path in whole.folder.iterdir():
        path.unlink()

    calls = 0
    last_call = {"first epoch": 2, "second epoch": 9, "validation": 2}[stop_at]

    def interrupt(*_):
        nonlocal calls
        calls += 1
        if calls == last_call:
            raise KeyboardInterrupt
        return 0.5

    with monkeypatch.context() as patch:
        if stop_at == "validation":
            patch.setattr(vision_transformer, "validate_in_eval_mode", interrupt)
        else:
            patch.setattr(training.Run, "on_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(make_run(n_epochs=3))
    # Another process, with other random numbers behind it
    continued = make_run(n_epochs=3)
    model = train(continued, seed=1)
    for key in ("train_losses", "val_accs"):
        assert continued.history[key] == whole.history[key]
    assert continued.history["val_accs_eval"][1:] == whole.history["val_accs_eval"][1:]
    assert_same_weights(model, expected)


def test_a_finished_run_is_loaded_not_repeated(demo_data, workplace):
    run = make_run(n_epochs=1)
    expected = train(run)
    again = make_run(n_epochs=1)
    model = small_model(seed=5)
    history = again.load_record(model)
    assert history == run.history
    assert again.has_weights
    assert_same_weights(model, expected)
    assert make_run(n_epochs=2).load_record(model) is None


def test_history_says_what_the_run_was(demo_data, workplace):
    run = make_run(n_epochs=1)
    train(run)
    history = training.read_history(run.folder / "history.json")
    assert {
        "train_losses",
        "val_accs",
        "val_accs_eval",
        "n_epochs",
        "batch_size",
        "lr",
        "seed",
        "device",
        "seconds",
        "versions",
        "date",
    } <= history.keys()
    assert all(0 <= value <= 1 for value in history["val_accs"])
    assert history["versions"]["torch"] == torch.__version__
    assert run.record_folder == run.folder, "only the default run goes to report/run"


def test_default_parameters_are_the_recipe():
    v = vision_transformer
    assert (v.DATASET_CACHE_DIR, v.BATCH_SIZE, v.LR, v.N_EPOCHS) == (
        "./data",
        128,
        3e-4,
        50,
    )
    run = training.Run("CIFAR10", v.BATCH_SIZE, v.LR, v.N_EPOCHS, v.SEED, CPU)
    assert run.settings == training.DEFAULTS


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
                run = training.Run("DemoCIFAR10", 16, 1e-3, 1, 0, cpu)
                history = vision_transformer.train(model, run, "data", 16, 1e-3, cpu)
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
    not training.is_present(torchvision.datasets.CIFAR10, DATA),
    reason="CIFAR-10 is not in ./data",
)


@real_data
def test_channel_statistics_are_the_constants_of_the_recipe():
    data = torchvision.datasets.CIFAR10(DATA, train=True).data / 255.0
    normalize = vision_transformer.NORMALIZATION
    assert torch.allclose(
        torch.tensor(data.mean((0, 1, 2))).double(),
        torch.tensor(normalize.mean).double(),
        atol=1e-6,
    )
    assert torch.allclose(
        torch.tensor(data.std((0, 1, 2))).double(),
        torch.tensor(normalize.std).double(),
        atol=1e-6,
    )


@real_data
def test_a_few_real_steps_lower_the_loss():
    torch.manual_seed(0)
    model = vision_transformer.VisionTransformer()
    loader, _ = vision_transformer.make_loaders(DATA, batch_size=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    batches = [batch for _, batch in zip(range(20), loader, strict=False)]
    losses = vision_transformer.train_one_epoch(model, batches, optimizer, CPU)
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.1
