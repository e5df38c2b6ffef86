"""Fetch cutouts and dust maps (extra ``fetch``): rate limited, retried, cached, verified, resumable."""

from mantis_photoz.fetch.cache import Cache
from mantis_photoz.fetch.client import Fetched, fetch
from mantis_photoz.fetch.dust import fetch_dust
from mantis_photoz.fetch.services import SERVICES, Job, plan_viewer

__all__ = ["SERVICES", "Cache", "Fetched", "Job", "fetch", "fetch_dust", "plan_viewer"]
