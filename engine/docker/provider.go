// How upstream's resources and fields are named in Pulumi: the same as in pulumi_docker 5.2.0.
// provider_test.go compares every name with that package.
package main

import (
	"strings"

	"github.com/pulumi/pulumi-terraform-bridge/v3/pkg/tfbridge"
	shimv2 "github.com/pulumi/pulumi-terraform-bridge/v3/pkg/tfshim/sdk-v2"
	"github.com/pulumi/pulumi/sdk/v3/go/common/tokens"
	"github.com/terraform-providers/terraform-provider-docker/shim"
)

const (
	packageName    = "docker"
	packageVersion = "5.2.0"
)

// Upstream's name -> Pulumi's.
var resourceNames = map[string]string{
	"docker_buildx_builder": "BuildxBuilder",
	"docker_config":         "ServiceConfig",
	"docker_container":      "Container",
	"docker_image":          "RemoteImage",
	"docker_network":        "Network",
	"docker_plugin":         "Plugin",
	"docker_registry_image": "RegistryImage",
	"docker_secret":         "Secret",
	"docker_service":        "Service",
	"docker_tag":            "Tag",
	"docker_volume":         "Volume",
}

var functionNames = map[string]string{
	"docker_image":                    "getRemoteImage",
	"docker_logs":                     "getLogs",
	"docker_network":                  "getNetwork",
	"docker_plugin":                   "getPlugin",
	"docker_registry_image":           "getRegistryImage",
	"docker_registry_image_manifests": "getRegistryImageManifests",
}

func providerInfo() tfbridge.ProviderInfo {
	info := tfbridge.ProviderInfo{
		P:           shimv2.NewProvider(shim.New(packageVersion)),
		Name:        packageName,
		Version:     packageVersion,
		DisplayName: "Docker",
		Config: map[string]*tfbridge.SchemaInfo{
			"host": {
				Default:        &tfbridge.DefaultInfo{EnvVars: []string{"DOCKER_HOST"}},
				MarkAsOptional: tfbridge.True(),
			},
			"registry_auth": {Name: "registryAuth", MaxItemsOne: tfbridge.False()},
		},
		Resources:   map[string]*tfbridge.ResourceInfo{},
		DataSources: map[string]*tfbridge.DataSourceInfo{},
	}
	for upstream, name := range resourceNames {
		info.Resources[upstream] = &tfbridge.ResourceInfo{Tok: tokens.Type(token(name))}
	}
	for upstream, name := range functionNames {
		info.DataSources[upstream] = &tfbridge.DataSourceInfo{Tok: tokens.ModuleMember(token(name))}
	}

	// Two containers cannot hold the same name or host port: the default is delete before replace.
	container := info.Resources["docker_container"]
	container.DeleteBeforeReplace = true
	// These lists keep upstream's names: the bridge would make a plural of the first and a singular of none.
	container.Fields = map[string]*tfbridge.SchemaInfo{
		"command":           {Name: "command"},
		"networks_advanced": {Name: "networksAdvanced"},
	}
	// An image's name is a reference to pull or build, not a name to derive from the resource's.
	info.Resources["docker_image"].Fields = map[string]*tfbridge.SchemaInfo{"name": {Name: "name"}}

	// A resource without a name gets its Pulumi name and a random suffix. Docker allows 255 characters.
	info.SetAutonaming(255, "-")
	return info
}

// token is docker:index/<lowerCamel>:<Name>.
func token(name string) string {
	return packageName + ":index/" + strings.ToLower(name[:1]) + name[1:] + ":" + name
}
