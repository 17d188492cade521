"""Teacher stores: which there are, and deleting them. They are folders beside the workers; the database knows nothing of them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from cliprd_core.store_removal import delete_store, list_stores
from service.errors import problem_responses
from service.routes.dependencies import ServicesOf
from service.strict_query import StrictRoute
from service.teacher_store_schemas import TeacherStoreList, TeacherStoreView

router = APIRouter(prefix="/teacher-stores", tags=["teacher stores"], route_class=StrictRoute)


@router.get("", summary="List teacher stores, most recently used first", responses=problem_responses(500))
def list_teacher_stores(services: ServicesOf) -> TeacherStoreList:
    """Every store in the folder of CLIPRD_TEACHER_STORE_ROOT, as this machine sees it."""
    stores = list_stores(services.settings.teacher_store_root)
    return TeacherStoreList(teacher_stores=[TeacherStoreView.of(store) for store in stores])


@router.delete("/{key}", status_code=204, summary="Delete a teacher store", responses=problem_responses(404, 409, 500))
def delete_teacher_store(services: ServicesOf, key: Annotated[str, Path(description="Key of the store.")]) -> None:
    """Free its space. A later run computes the features again. A store that a run uses now stays (409)."""
    delete_store(services.settings.teacher_store_root, key)
