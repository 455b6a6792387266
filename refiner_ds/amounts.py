"""Numbers for people to read."""

from __future__ import annotations

__all__ = ["amount"]


def amount(value: float) -> str:
    """Three significant digits, and no exponent where that would be read amiss: 0.0155, 56.3, 1,612."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
