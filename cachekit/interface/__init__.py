"""What plugins and adapters are written against: sites, policies, adapters, observations, specs."""
