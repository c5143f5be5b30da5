"""With scikit-learn: a pipeline, cross-validation, a grid search over strategies, and a model saved without pickle."""

from pathlib import Path
from tempfile import TemporaryDirectory

import click
from sklearn.datasets import load_wine
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PowerTransformer

from tuneforge.sklearn import TunedClassifier


@click.command()
@click.option("--epochs", default=20, show_default=True)
@click.option("--folds", default=5, show_default=True)
def main(epochs: int, folds: int) -> None:
    """Classify the 178 wines that ship with scikit-learn."""
    wines = load_wine()
    x, x_test, y, y_test = train_test_split(
        wines.data, wines.target, test_size=0.3, stratify=wines.target, random_state=0
    )

    pipeline = make_pipeline(PowerTransformer(), TunedClassifier("mlp", "full", random_state=0))
    pipeline.set_params(tunedclassifier__strategy__epochs=epochs)
    scores = cross_val_score(pipeline, x, y, cv=folds)
    click.echo(f"full: accuracy {scores.mean():.3f} +- {scores.std():.3f} in {folds} folds")

    grid = {
        "tunedclassifier__strategy": ["full", "head-only", "freeze-then-unfreeze", "lp-ft"],
        "tunedclassifier__strategy__lr": [1e-3, 1e-2],
    }
    search = GridSearchCV(pipeline, grid, cv=folds).fit(x, y)
    for params, mean in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        click.echo(f"{', '.join(map(str, params.values())):>30}  {mean:.3f}")
    click.echo(f"best: {search.best_params_}; on the test split {search.score(x_test, y_test):.3f}")

    with TemporaryDirectory() as folder:
        estimator = search.best_estimator_[-1]
        estimator.save(Path(folder) / "wines")
        loaded = TunedClassifier.load(Path(folder) / "wines")
        click.echo(f"saved and loaded: {', '.join(sorted(file.name for file in (Path(folder) / 'wines').iterdir()))}")
        assert (loaded.predict_proba(x_test) == estimator.predict_proba(x_test)).all()


if __name__ == "__main__":
    main()
