# SPDX-License-Identifier: Apache-2.0
"""Compute kernels, one folder per operation; `dispatch` chooses between the implementations of one."""
