"""What models are measured on, a file each: documents, code, translations, tasks of lm-evaluation-harness."""

from .base import Session, Suite, Turn
from .code import CodeSuite
from .documents import DocumentSuite
from .tasks import TaskSuite
from .translations import TranslationSuite

__all__ = ["CodeSuite", "DocumentSuite", "Session", "Suite", "TaskSuite", "TranslationSuite", "Turn"]
