"""What jobs and the backend are built from: settings, store, queue, Label Studio, artifacts, images."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

from redis import Redis

from worker import queue
from worker.artifacts import Artifacts
from worker.credentials import SetupToken
from worker.errors import QueueUnavailable
from worker.images import ImageFetcher
from worker.label_studio import LabelStudio
from worker.settings import Settings, load_settings
from worker.store import Store


class Services:
    """Connections of one process, each made when first used. Nothing is shared with a forked child."""

    def __init__(self, settings: Settings, role: Literal["web", "worker"]) -> None:
        self.settings = settings
        self.role = role

    @cached_property
    def store(self) -> Store:
        return Store(self.settings.store_url)

    @cached_property
    def redis(self) -> Redis:
        if not self.settings.redis_url:
            raise QueueUnavailable("REDIS_URL is not set: start with `hardfirst up`, or name a Redis or Valkey")
        return queue.connect(self.settings.redis_url, self.role)

    @cached_property
    def label_studio(self) -> LabelStudio:
        kept = SetupToken(self.settings.data_dir.expanduser().resolve() / "label-studio-token")
        return LabelStudio(self.settings.label_studio_url, self.settings.api_key, kept)

    @cached_property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.settings.artifacts_root, self.settings.data_dir / "cache")

    @cached_property
    def images(self) -> ImageFetcher:
        return ImageFetcher(
            label_studio_url=self.settings.label_studio_url,
            auth_headers=self.label_studio.auth_headers,
            check_token=self.label_studio.check_token,
            allowed_hosts=self.settings.allowed_image_hosts,
            max_bytes=self.settings.image_max_mb * 1_000_000,
            max_pixels=self.settings.image_max_megapixels * 1_000_000,
            local_files_root=self.settings.local_files_root,
            buckets=self.settings.readable_buckets,
        )

    def close(self) -> None:
        """End the connections that were made."""
        made = vars(self)  # a cached property is here once it was used, and asking for one would make it
        for name in ("images", "label_studio", "redis", "store"):
            if name in made:
                made[name].close()

    @property
    def ultralytics_dir(self) -> Path:
        return self.settings.data_dir.resolve() / "ultralytics"


def from_environment(role: Literal["web", "worker"]) -> Services:
    """
    Raises:
        SettingsInvalid: a variable of the environment has a value that cannot be right.
    """
    return Services(load_settings(), role)
