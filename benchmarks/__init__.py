# SPDX-License-Identifier: Apache-2.0
"""Measurements: scripts that make records, and the tables that are made from records."""
