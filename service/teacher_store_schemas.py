"""What the API answers about teacher stores."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Self

from pydantic import Field

from cliprd_core.store_dir import StoreKey, StoreRecord
from service.schemas import View


class TeacherStoreView(View):
    """A teacher's features of one data set, kept on disk. What describes it is null where its own description is damaged."""

    key: str = Field(description="Names it; a digest of everything the features depend on.")
    teacher: str | None = Field(description="Name of the teacher.")
    data: str | None = Field(description="The training data.")
    depends_on: StoreKey | None = Field(description="Everything the features depend on.")
    num_bytes: int = Field(description="Size once it is full.")
    num_bytes_on_disk: int = Field(description="Size now.")
    num_images: int = Field(description="Image features that are there, views counted each; may lag half a minute behind.")
    num_texts: int = Field(description="Caption features that are there; may lag half a minute behind.")
    filled: float | None = Field(description="The two as a fraction 0-1 of all there will be.")
    hits: int = Field(description="Features that were read instead of computed.")
    misses: int = Field(description="Features that were not there yet, or damaged.")
    created_at: datetime | None
    last_used_at: datetime
    in_use: bool = Field(description="A run uses it now, so it can't be deleted.")

    @classmethod
    def of(cls, store: StoreRecord) -> Self:
        meta, usage = store.meta, store.usage
        total = None if meta is None else (meta.key.num_views + 1) * meta.key.num_samples
        return cls(
            key=store.key,
            teacher=None if meta is None else meta.teacher,
            data=None if meta is None else meta.data,
            depends_on=None if meta is None else meta.key,
            num_bytes=store.num_bytes,
            num_bytes_on_disk=store.num_bytes_on_disk,
            num_images=usage.num_images,
            num_texts=usage.num_texts,
            filled=None if total is None else (usage.num_images + usage.num_texts) / total,
            hits=usage.hits,
            misses=usage.misses,
            created_at=None if meta is None else datetime.fromtimestamp(meta.created, UTC),
            last_used_at=datetime.fromtimestamp(usage.last_used, UTC),
            in_use=store.in_use,
        )


class TeacherStoreList(View):
    """All teacher stores, most recently used first."""

    teacher_stores: list[TeacherStoreView]
