// pulumi-resource-docker: the Docker provider for Pulumi, bridged from the Terraform provider.
// It covers what the Python package pulumi_docker 5.2.0 declares, except docker:index/image:Image.
package main

import (
	"github.com/pulumi/pulumi-terraform-bridge/v3/pkg/tfbridge"
)

// The bridge reads only the package's name and version of a schema at run time; the Python SDK has the rest.
var pulumiSchema = []byte(`{"name":"` + packageName + `","version":"` + packageVersion + `"}`)

func main() {
	tfbridge.Main(packageName, packageVersion, providerInfo(), pulumiSchema)
}
