"""What concerns one's own data, on the wire."""

from pydantic import BaseModel, Field


class WebhookSecret(BaseModel):
    """What your webhooks are signed with."""

    secret: str = Field(
        description="For any library of the Standard Webhooks; it changes when the server's keys do, and for a while "
        "both are used.",
        examples=["whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD…"],
    )
