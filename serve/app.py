"""The application: `build(args)` creates it for `latent serve`, `serve run` and config.yaml.

    latent serve                              on this machine, with the bundled predictors
    latent serve --run out/demo               with your own run
    serve run serve.app:build run=out/demo    the same with Ray's command line
    serve deploy serve/config.yaml            on a cluster

Importing this module starts nothing.
"""

from pathlib import Path
from typing import Any

from ray import serve

from lvm.storage import location
from lvm.vectors.index import published
from serve.decoder import Decoder
from serve.encoder import Encoder
from serve.gateway import Gateway
from serve.predictor import Predictor
from serve.release import ReleaseArgs, read_models
from serve.retriever import Retriever
from serve.searcher import Searcher
from serve.settings import Scale, ServeArgs, codec_name, models_of, require_run


def build(args: ServeArgs) -> serve.Application:
    """The application. Raises InputError if the run folder is incomplete or a model is missing.

    Model aliases are resolved now. To roll out newer models, build again or change `user_config` (serve/release.py).
    """
    run = args.run and str(location(args.run).absolute())
    inbox = args.inbox and str(Path(args.inbox).absolute())
    args = args.model_copy(update={"run": run, "inbox": inbox})
    if run:
        require_run(run)
    # Resolved now, so that replicas that start after a switch to another run do not need this one.
    args = args.model_copy(update={"codec": codec_name(args)})
    release = ReleaseArgs(run=run, release=args.release, models=read_models(models_of(run))).model_dump()

    def scaled(deployment: Any, scale: Scale, max_ongoing: int) -> Any:
        return deployment.options(
            max_ongoing_requests=max_ongoing,
            autoscaling_config={
                "min_replicas": scale.min_replicas,
                "max_replicas": scale.max_replicas,
                "target_ongoing_requests": scale.target_ongoing_requests,
                "upscale_delay_s": scale.upscale_delay_s,
                "downscale_delay_s": scale.downscale_delay_s,
                "metrics_interval_s": 1.0,
                "look_back_period_s": 3.0,
            },
            ray_actor_options={
                "num_cpus": scale.num_cpus,
                "num_gpus": scale.num_gpus,
                "resources": scale.resources,
                "runtime_env": {
                    "env_vars": {"OMP_NUM_THREADS": str(scale.num_threads), "OMP_WAIT_POLICY": "PASSIVE"}
                },
            },
            health_check_period_s=2.0,
            health_check_timeout_s=20.0,
            graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=10.0,
            max_surge_percent=100,  # a new version's replica is ready before the old one's stops
        )

    calls = args.max_calls

    def unless_inline(
        name: str, deployment: Any, scale: Scale, max_ongoing: int, *bound: Any, **options: Any
    ) -> Any:
        if name in args.inline:
            return None
        return scaled(deployment, scale, max_ongoing).options(**options).bind(args, *bound)

    if args.searchers:
        published(location(args.run) / "index", args.searchers)  # raises if the index has fewer parts
    searchers = [
        scaled(Searcher, args.searcher, 3 * calls).options(name=f"Searcher{share + 1}").bind(args, share)
        for share in range(args.searchers)
    ]
    return (
        scaled(Gateway, args.gateway, 4 * args.limits.max_pending)
        .options(
            max_queued_requests=args.limits.max_pending,
            backpressure_config={"status_code": 429, "retry_after_s": 1},
            user_config=release,
        )
        .bind(  # type: ignore[no-any-return]
            args,
            unless_inline("encoder", Encoder, args.encoder, calls),
            unless_inline("predictor", Predictor, args.predictor, calls, user_config=release),
            unless_inline("retriever", Retriever, args.retriever, 3 * calls, searchers, user_config=release)
            if run
            else None,
            scaled(Decoder, args.decoder, 2 * args.queue_rows).bind(args),
        )
    )
