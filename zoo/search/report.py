from typing import Any
def html(data: dict[str, Any]) -> str:
    return "<html></html>"
