"""Optional logging of learning curves to MLflow, in addition to TensorBoard.

The MLflow run is found by the name of the training run, so resuming continues it. Needs the extra `mlflow`.
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lvm.errors import InputError

EXPERIMENT = "latent"


def prepare_mlflow(where: str) -> str:
    """The tracking URI of a URI or folder, after creating our experiment there.

    Raises InputError if MLflow is not installed or cannot use the location.
    """
    if find_spec("mlflow") is None:
        raise InputError(
            "--mlflow needs the package mlflow, which is not installed: pip install 'latent-vector-models[mlflow]'"
        )
    uri = where if "://" in where else Path(where).absolute().as_uri()
    _open(uri)
    return uri


class MlflowCurves:
    """The MLflow run of one training run."""

    def __init__(self, uri: str, name: str, parameters: Mapping[str, Any]) -> None:
        """uri: from `prepare_mlflow`; name: of the run; parameters: logged with it. Raises InputError if MLflow cannot
        be used."""
        from mlflow.exceptions import MlflowException

        self._client, experiment = _open(uri)
        try:
            found = self._client.search_runs([experiment], f"attributes.run_name = '{name}'", max_results=1)
            if found:
                self._run = found[0].info.run_id
                self._client.update_run(self._run, status="RUNNING")
                return
            self._run = self._client.create_run(experiment, run_name=name).info.run_id
            for key, value in parameters.items():
                self._client.log_param(self._run, key, value)
        except MlflowException as err:
            raise InputError(f"MLflow at {uri} refused the run {name}: {_first_line(err)}") from err

    def log(self, row: Mapping[str, Any]) -> str:
        """Log an entry of the learning curve; returns "", or why it failed: training continues without it."""
        from mlflow.exceptions import MlflowException

        try:
            for key, value in row.items():
                if key != "epoch":
                    self._client.log_metric(self._run, key, float(value), step=row["epoch"])
        except MlflowException as err:
            return f"MLflow did not take epoch {row['epoch']}: {_first_line(err)}"
        return ""

    def close(self, finished: bool) -> None:
        """Mark the run as finished or failed."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")
        except MlflowException:
            return  # only the status is lost


def _open(uri: str) -> tuple[Any, str]:
    """A client and the id of our experiment, created if needed. Raises InputError if MLflow cannot be used."""
    # MLflow 3 accepts a folder as store only with this opt-in.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        return client, str(client.create_experiment(EXPERIMENT) if found is None else found.experiment_id)
    except (MlflowException, ImportError) as err:
        raise InputError(
            f"--mlflow {uri} cannot be used ({_first_line(err)}); expected a folder or the URI of an MLflow server"
        ) from err


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
