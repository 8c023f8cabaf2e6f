// Which Pulumi plugins the Python packages of an environment need.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strings"

	"github.com/pulumi/pulumi/sdk/v3/go/common/resource/plugin"
	"github.com/pulumi/pulumi/sdk/v3/go/common/util/logging"
	pulumirpc "github.com/pulumi/pulumi/sdk/v3/proto/go"
	"github.com/pulumi/pulumi/sdk/v3/python/toolchain"
)

// listing prints every installed distribution with its pulumi-plugin.json, which is the file's text or null.
// The module is named like the distribution, with underscores. Distributions are asked, not pip: a virtual
// environment made by uv has no pip.
const listing = `
import sys
sys.path = [folder for folder in sys.path if folder]  # the working directory must not shadow the standard library
import importlib.metadata, json, re
found = {}
for distribution in importlib.metadata.distributions():
    name = distribution.metadata["Name"]
    if not name:
        continue
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        continue  # the first on sys.path is the one that is imported
    plugin = None
    module = re.sub(r"[-.]+", "_", name)
    folders = [distribution.locate_file(module)]
    direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    if direct.get("dir_info", {}).get("editable") and direct.get("url", "").startswith("file://"):
        from pathlib import Path
        from urllib.parse import unquote, urlparse
        folders.append(Path(unquote(urlparse(direct["url"]).path)) / module)
    for folder in folders:
        try:
            with open(str(folder) + "/pulumi-plugin.json", encoding="utf-8") as file:
                plugin = file.read()
            break
        except FileNotFoundError:
            pass
    found[key] = {"name": key, "version": distribution.version, "plugin": plugin}
json.dump([found[key] for key in sorted(found)], sys.stdout)
`

// These carry the pulumi- prefix and no plugin.
var withoutPlugin = map[string]bool{"pulumi-policy": true, "pulumi-esc-sdk": true}

type distribution struct {
	Name    string  `json:"name"`    // normalised: lower case, single hyphens
	Version string  `json:"version"` // PEP 440
	Plugin  *string `json:"plugin"`  // text of pulumi-plugin.json
}

func distributions(ctx context.Context, chain toolchain.Toolchain) ([]distribution, error) {
	command, err := chain.Command(ctx, "-c", listing)
	if err != nil {
		return nil, err
	}
	output, err := command.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return nil, fmt.Errorf("listing the installed Python packages with %s: %w: %s", command.Path, err, exit.Stderr)
		}
		return nil, fmt.Errorf("listing the installed Python packages with %s: %w", command.Path, err)
	}
	var found []distribution
	if err := json.Unmarshal(output, &found); err != nil {
		return nil, fmt.Errorf("listing the installed Python packages with %s: %w", command.Path, err)
	}
	return found, nil
}

// requirement is the plugin that a package needs, or nil when it needs none or its version cannot be told.
func requirement(found distribution) (*pulumirpc.PackageDependency, error) {
	if withoutPlugin[found.Name] || (found.Plugin == nil && !strings.HasPrefix(found.Name, "pulumi-")) {
		return nil, nil
	}
	described := plugin.PulumiPluginJSON{Resource: true}
	if found.Plugin != nil {
		described.Resource = false
		if err := json.Unmarshal([]byte(*found.Plugin), &described); err != nil {
			return nil, fmt.Errorf("pulumi-plugin.json of the Python package %s: %w", found.Name, err)
		}
	}
	if !described.Resource {
		return nil, nil // the package says that it has no plugin
	}
	if described.Name == "" {
		described.Name = strings.TrimPrefix(found.Name, "pulumi-")
	}
	if described.Version == "" {
		version, err := pluginVersion(found.Version)
		if err != nil {
			logging.V(5).Infof("no plugin version for package %s %s: %v", found.Name, found.Version, err)
			return nil, nil
		}
		described.Version = version
	}
	return &pulumirpc.PackageDependency{
		Name:             described.Name,
		Version:          "v" + strings.TrimPrefix(described.Version, "v"),
		Kind:             "resource",
		Server:           described.Server,
		Parameterization: parameterization(described.Parameterization),
		Extension:        parameterization(described.ExtensionParameterization),
	}, nil
}

func parameterization(described *plugin.PulumiParameterizationJSON) *pulumirpc.PackageParameterization {
	if described == nil {
		return nil
	}
	return &pulumirpc.PackageParameterization{
		Name: described.Name, Version: described.Version, Value: described.Value,
	}
}

// PEP 440 without an epoch: release, then a pre-release, a post-release and a development release, each optional.
var pep440 = regexp.MustCompile(`^(\d+(?:\.\d+)*)(?:(a|b|rc)(\d*))?(?:\.post(\d*))?(?:\.dev(\d*))?$`)

var preReleases = map[string]string{"a": "-alpha.", "b": "-beta.", "rc": "-rc."}

// pluginVersion turns a Python version into a plugin's semantic version: 1.2 is 1.2.0, 1.2.3rc4 is 1.2.3-rc.4,
// 1.2.3.post4.dev5 is 1.2.3+post4dev5.
func pluginVersion(version string) (string, error) {
	match := pep440.FindStringSubmatchIndex(version)
	if match == nil {
		return "", fmt.Errorf("%q is not a version that a plugin's can be derived from", version)
	}
	group := func(n int) (string, bool) {
		if match[2*n] < 0 {
			return "", false
		}
		return version[match[2*n]:match[2*n+1]], true
	}
	result, _ := group(1)
	for strings.Count(result, ".") < 2 {
		result += ".0"
	}
	if kind, ok := group(2); ok {
		number, _ := group(3)
		result += preReleases[kind] + number
	}
	suffix := ""
	if number, ok := group(4); ok {
		suffix += "post" + number
	}
	if number, ok := group(5); ok {
		suffix += "dev" + number
	}
	if suffix != "" {
		result += "+" + suffix
	}
	return result, nil
}
