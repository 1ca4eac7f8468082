"""Text that callers send to be kept, or compared with what is."""

from typing import Annotated

from pydantic import Field

Text = Annotated[str, Field(pattern=r"^[^\u0000-\u001f\u007f]*$")]
"""Without control characters: PostgreSQL cannot keep a NUL, nor compare one."""
