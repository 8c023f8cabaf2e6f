// Every name of the bridged provider is the one that the Python package pulumi_docker 5.2.0 sends.
package main

import (
	"encoding/json"
	"os"
	"sort"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pulumi/pulumi-terraform-bridge/v3/pkg/tfbridge"
	"github.com/pulumi/pulumi-terraform-bridge/v3/pkg/tfshim"
)

// declared are the names in the Python package: inputs of resources and of the provider, results of functions.
type declared struct {
	Resources map[string][]string `json:"resources"`
	Functions map[string][]string `json:"functions"`
	Config    []string            `json:"config"`
}

func pythonPackage(t *testing.T) declared {
	t.Helper()
	content, err := os.ReadFile("testdata/pulumi_docker-" + packageVersion + ".json")
	require.NoError(t, err)
	var result declared
	require.NoError(t, json.Unmarshal(content, &result))
	return result
}

// names lists the fields of a schema as Pulumi spells them, nested ones after a dot.
func names(fields shim.SchemaMap, infos map[string]*tfbridge.SchemaInfo, wanted func(shim.Schema) bool) []string {
	var result []string
	fields.Range(func(upstream string, field shim.Schema) bool {
		if !wanted(field) {
			return true
		}
		name := tfbridge.TerraformToPulumiNameV2(upstream, fields, infos)
		result = append(result, name)
		if nested, ok := field.Elem().(shim.Resource); ok {
			// The package has one type for a nested object's inputs and outputs.
			for _, inner := range names(nested.Schema(), nil, func(shim.Schema) bool { return true }) {
				result = append(result, name+"."+inner)
			}
		}
		return true
	})
	sort.Strings(result)
	return result
}

func input(field shim.Schema) bool {
	return (field.Optional() || field.Required()) && field.Removed() == ""
}

func TestResourceInputsAreNamedAsInThePythonPackage(t *testing.T) {
	info := providerInfo()
	expected := pythonPackage(t).Resources
	for upstream, resource := range info.Resources {
		name := strings.Split(string(resource.Tok), ":")[2]
		schema := info.P.ResourcesMap().Get(upstream).Schema()
		assert.Equal(t, expected[name], names(schema, resource.Fields, input), name)
		delete(expected, name)
	}
	assert.Empty(t, expected, "resources of the package that are not bridged")
}

func TestFunctionResultsAreNamedAsInThePythonPackage(t *testing.T) {
	info := providerInfo()
	expected := pythonPackage(t).Functions
	for upstream, function := range info.DataSources {
		name := strings.Split(string(function.Tok), ":")[2]
		schema := info.P.DataSourcesMap().Get(upstream).Schema()
		actual := names(schema, function.Fields, func(shim.Schema) bool { return true })
		for i := len(actual) - 1; i >= 0; i-- {
			if actual[i] == "id" {
				actual = append(actual[:i], actual[i+1:]...)
			}
		}
		assert.Equal(t, expected[name], actual, name)
		delete(expected, name)
	}
	assert.Empty(t, expected, "functions of the package that are not bridged")
}

func TestProviderConfigurationIsNamedAsInThePythonPackage(t *testing.T) {
	info := providerInfo()
	assert.Equal(t, pythonPackage(t).Config, names(info.P.Schema(), info.Config, input))
}

func TestEveryUpstreamResourceAndFunctionHasAToken(t *testing.T) {
	info := providerInfo()
	info.P.ResourcesMap().Range(func(name string, _ shim.Resource) bool {
		assert.Contains(t, info.Resources, name)
		return true
	})
	info.P.DataSourcesMap().Range(func(name string, _ shim.Resource) bool {
		assert.Contains(t, info.DataSources, name)
		return true
	})
}

func TestContainerIsDeletedBeforeItIsReplacedUnlessTheProgramSaysOtherwise(t *testing.T) {
	assert.True(t, providerInfo().Resources["docker_container"].DeleteBeforeReplace)
}

func TestTokens(t *testing.T) {
	assert.Equal(t, "docker:index/remoteImage:RemoteImage", token("RemoteImage"))
	assert.Equal(t, "docker:index/getNetwork:getNetwork", token("getNetwork"))
}
