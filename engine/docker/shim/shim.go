// Package shim opens upstream's internal provider to the bridge.
// engine/build.py copies it into the build folder's copy of upstream: only code there may import `internal`.
package shim

import (
	"github.com/hashicorp/terraform-plugin-sdk/v2/helper/schema"

	"github.com/terraform-providers/terraform-provider-docker/internal/provider"
)

// New is upstream's provider; version is what it reports to registries as its user agent.
func New(version string) *schema.Provider { return provider.New(version)() }
