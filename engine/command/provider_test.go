// The provider through its own interface, as the engine calls it; local commands run for real.
package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blang/semver"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	p "github.com/pulumi/pulumi-go-provider"
	"github.com/pulumi/pulumi-go-provider/integration"
	"github.com/pulumi/pulumi/sdk/v3/go/common/resource"
	"github.com/pulumi/pulumi/sdk/v3/go/common/tokens"
	"github.com/pulumi/pulumi/sdk/v3/go/property"
)

const localCommand = "command:local:Command"

func server(t *testing.T) integration.Server {
	t.Helper()
	provider, err := newProvider()
	require.NoError(t, err)
	server, err := integration.NewServer(context.Background(), packageName, semver.MustParse(packageVersion),
		integration.WithProvider(provider))
	require.NoError(t, err)
	require.NoError(t, server.Configure(p.ConfigureRequest{}))
	return server
}

func urn(kind string) resource.URN {
	return resource.NewURN("test", "project", "", tokens.Type(kind), "name")
}

func text(value string) property.Value { return property.New(value) }

func properties(values map[string]property.Value) property.Map { return property.NewMap(values) }

func list(values ...property.Value) property.Value { return property.New(property.NewArray(values)) }

func mapping(values map[string]property.Value) property.Value {
	return property.New(property.NewMap(values))
}

func check(t *testing.T, s integration.Server, kind string, inputs property.Map) property.Map {
	t.Helper()
	response, err := s.Check(p.CheckRequest{Urn: urn(kind), Inputs: inputs})
	require.NoError(t, err)
	require.Empty(t, response.Failures)
	return response.Inputs
}

func create(t *testing.T, s integration.Server, kind string, inputs property.Map) (p.CreateResponse, error) {
	t.Helper()
	return s.Create(p.CreateRequest{Urn: urn(kind), Properties: check(t, s, kind, inputs)})
}

func created(t *testing.T, s integration.Server, kind string, inputs property.Map) property.Map {
	t.Helper()
	response, err := create(t, s, kind, inputs)
	require.NoError(t, err)
	return response.Properties
}

func update(t *testing.T, s integration.Server, state, inputs property.Map) property.Map {
	t.Helper()
	response, err := s.Update(p.UpdateRequest{
		ID: "id", Urn: urn(localCommand), State: state, Inputs: check(t, s, localCommand, inputs),
	})
	require.NoError(t, err)
	return response.Properties
}

func TestCreateRunsTheCommandAndGivesItsOutput(t *testing.T) {
	state := created(t, server(t), localCommand, properties(map[string]property.Value{
		"create": text("echo out; echo; echo err >&2"),
	}))
	assert.Equal(t, "out\n", state.Get("stdout").AsString(), "one trailing newline goes, the others stay")
	assert.Equal(t, "err", state.Get("stderr").AsString())
}

func TestPreviewRunsNothing(t *testing.T) {
	file := filepath.Join(t.TempDir(), "made")
	s := server(t)
	inputs := check(t, s, localCommand, properties(map[string]property.Value{"create": text("touch " + file)}))
	response, err := s.Create(p.CreateRequest{Urn: urn(localCommand), Properties: inputs, DryRun: true})
	require.NoError(t, err)
	assert.NoFileExists(t, file)
	assert.True(t, response.Properties.Get("stdout").IsComputed(), "the output is not known yet")
}

func TestCommandGetsStdinEnvironmentDirectoryAndInterpreter(t *testing.T) {
	folder := t.TempDir()
	s := server(t)
	state := created(t, s, localCommand, properties(map[string]property.Value{
		"create":      text(`cat; echo " $GREETING"; pwd -P`),
		"stdin":       text("from stdin"),
		"environment": mapping(map[string]property.Value{"GREETING": text("hello")}),
		"dir":         text(folder),
	}))
	real, err := filepath.EvalSymlinks(folder)
	require.NoError(t, err)
	assert.Equal(t, "from stdin hello\n"+real, state.Get("stdout").AsString())

	state = created(t, s, localCommand, properties(map[string]property.Value{
		"create": text("not a shell's business: $HOME"), "interpreter": list(text("/bin/echo"), text("-n"), text(">")),
	}))
	assert.Equal(t, "> not a shell's business: $HOME", state.Get("stdout").AsString())
}

func TestDirectoryThatDoesNotExistIsAnError(t *testing.T) {
	_, err := create(t, server(t), localCommand, properties(map[string]property.Value{
		"create": text("true"), "dir": text("/does/not/exist"),
	}))
	assert.ErrorContains(t, err, "/does/not/exist")
}

func TestFailedCommandIsAnErrorWithItsOutput(t *testing.T) {
	_, err := create(t, server(t), localCommand, properties(map[string]property.Value{
		"create": text("echo before; echo why >&2; exit 3"),
	}))
	require.Error(t, err)
	for _, part := range []string{"exit status 3", "before", "why", `running "echo before`} {
		assert.ErrorContains(t, err, part)
	}
}

func TestUpdateRunsUpdateElseCreateAndSeesThePreviousOutput(t *testing.T) {
	show := `echo "was $PULUMI_COMMAND_STDOUT/$PULUMI_COMMAND_STDERR"`
	s := server(t)
	state := created(t, s, localCommand, properties(map[string]property.Value{"create": text("echo one; echo two >&2")}))

	updated := update(t, s, state, properties(map[string]property.Value{"create": text("false"), "update": text(show)}))
	assert.Equal(t, "was one/two", updated.Get("stdout").AsString())

	again := update(t, s, state, properties(map[string]property.Value{"create": text(show)}))
	assert.Equal(t, "was one/two", again.Get("stdout").AsString(), "create is run again where there is no update")

	none := update(t, s, state, properties(map[string]property.Value{"delete": text("true")}))
	assert.Equal(t, "one", none.Get("stdout").AsString(), "neither: the old output stays")

	without := update(t, s, state, properties(map[string]property.Value{
		"update": text(show), "addPreviousOutputInEnv": property.New(false),
	}))
	assert.Equal(t, "was /", without.Get("stdout").AsString())
}

func TestDeleteRunsDeleteWithThePreviousOutput(t *testing.T) {
	file := filepath.Join(t.TempDir(), "deleted")
	s := server(t)
	state := created(t, s, localCommand, properties(map[string]property.Value{
		"create": text("echo one"), "delete": text("echo $PULUMI_COMMAND_STDOUT > " + file),
	}))
	require.NoError(t, s.Delete(p.DeleteRequest{ID: "id", Urn: urn(localCommand), Properties: state}))
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	assert.Equal(t, "one\n", string(content))
}

func TestDeleteThatFailsIsAnError(t *testing.T) {
	s := server(t)
	state := created(t, s, localCommand, properties(map[string]property.Value{"delete": text("echo busy; false")}))
	assert.ErrorContains(t, s.Delete(p.DeleteRequest{ID: "id", Urn: urn(localCommand), Properties: state}), "busy")
}

func TestChangedTriggerReplacesAndOtherChangesUpdate(t *testing.T) {
	s := server(t)
	before := properties(map[string]property.Value{"create": text("true"), "triggers": list(text("a"), property.New(1.0))})
	diff := func(after property.Map) p.DiffResponse {
		old := check(t, s, localCommand, before)
		state := created(t, s, localCommand, before)
		response, err := s.Diff(p.DiffRequest{
			ID: "id", Urn: urn(localCommand), State: state, OldInputs: old, Inputs: check(t, s, localCommand, after),
		})
		require.NoError(t, err)
		return response
	}
	assert.False(t, diff(before).HasChanges)

	replaced := diff(properties(map[string]property.Value{"create": text("true"), "triggers": list(text("b"), property.New(1.0))}))
	require.True(t, replaced.HasChanges)
	assert.Equal(t, p.UpdateReplace, replaced.DetailedDiff["triggers[0]"].Kind)

	updated := diff(properties(map[string]property.Value{"create": text("echo"), "triggers": list(text("a"), property.New(1.0))}))
	require.True(t, updated.HasChanges)
	assert.Equal(t, p.Update, updated.DetailedDiff["create"].Kind)
}

func TestAssetAndArchivePathsGiveTheFilesThatTheGlobsName(t *testing.T) {
	folder := t.TempDir()
	state := created(t, server(t), localCommand, properties(map[string]property.Value{
		"create":       text("mkdir -p assets/logos src; touch assets/logos/logo.svg src/index.js src/secret.js other"),
		"dir":          text(folder),
		"assetPaths":   list(text("assets/**"), text("src/**.js"), text("!**secret.*")),
		"archivePaths": list(text("src/*")),
	}))
	assets := state.Get("assets").AsMap()
	assert.Equal(t, 2, assets.Len())
	for _, name := range []string{"assets/logos/logo.svg", "src/index.js"} {
		assert.Equal(t, filepath.Join(folder, name), assets.Get(name).AsMap().Get("path").AsString())
	}
	archived := state.Get("archive").AsMap().Get("assets").AsMap()
	assert.Equal(t, 2, archived.Len(), "%v", archived)
}

func TestUnknownInputsAndValuesAreRefused(t *testing.T) {
	s := server(t)
	connection := func(extra map[string]property.Value) property.Value {
		extra["host"] = text("h")
		return mapping(extra)
	}
	for name, each := range map[string]struct {
		kind   string
		inputs map[string]property.Value
		says   string
	}{
		"misspelt":            {localCommand, map[string]property.Value{"crate": text("true")}, `unknown property "crate"`},
		"remote's on local":   {localCommand, map[string]property.Value{"connection": connection(map[string]property.Value{})}, `unknown property "connection"`},
		"local's on remote":   {"command:remote:Command", map[string]property.Value{"dir": text("/"), "connection": connection(map[string]property.Value{})}, `unknown property "dir"`},
		"in the connection":   {"command:remote:Command", map[string]property.Value{"connection": connection(map[string]property.Value{"proxyHost": text("p")})}, `unknown property "connection.proxyHost"`},
		"in the proxy":        {"command:remote:Command", map[string]property.Value{"connection": connection(map[string]property.Value{"proxy": connection(map[string]property.Value{"proxy": text("p")})})}, `unknown property "connection.proxy.proxy"`},
		"logging mode":        {localCommand, map[string]property.Value{"logging": text("all")}, `"all" is not one of`},
		"a secret connection": {"command:remote:Command", map[string]property.Value{"connection": connection(map[string]property.Value{"x": text("p")}).WithSecret(true)}, `unknown property "connection.x"`},
	} {
		t.Run(name, func(t *testing.T) {
			response, err := s.Check(p.CheckRequest{Urn: urn(each.kind), Inputs: properties(each.inputs)})
			require.NoError(t, err)
			var reasons []string
			for _, failure := range response.Failures {
				reasons = append(reasons, failure.Reason)
			}
			assert.Contains(t, strings.Join(reasons, "\n"), each.says)
		})
	}
}

func TestMissingConnectionIsRefused(t *testing.T) {
	response, err := server(t).Check(p.CheckRequest{
		Urn: urn("command:remote:Command"), Inputs: properties(map[string]property.Value{"create": text("true")}),
	})
	require.NoError(t, err)
	require.NotEmpty(t, response.Failures)
	assert.Equal(t, "connection", response.Failures[0].Property)
}

func TestOtherTokensAreErrors(t *testing.T) {
	for _, kind := range []string{"command:remote:CopyToRemote", "command:remote:CopyFile", "command:local:Other"} {
		_, err := server(t).Check(p.CheckRequest{Urn: urn(kind)})
		assert.ErrorContains(t, err, strings.TrimPrefix(kind, "command:"))
	}
	_, err := server(t).Invoke(p.InvokeRequest{Token: "command:local:run"})
	assert.ErrorContains(t, err, "command:local:run")
}

func TestSecretInputMakesTheOutputSecretAndShowsInNoError(t *testing.T) {
	s := server(t)
	environment := mapping(map[string]property.Value{"TOKEN": text("s3cr3t-token").WithSecret(true)})
	state := created(t, s, localCommand, properties(map[string]property.Value{
		"create": text("echo $TOKEN"), "environment": environment,
	}))
	assert.True(t, state.Get("stdout").Secret())
	assert.Equal(t, "s3cr3t-token", state.Get("stdout").AsString())

	plain := created(t, s, localCommand, properties(map[string]property.Value{"create": text("echo x")}))
	assert.False(t, plain.Get("stdout").Secret())

	_, err := create(t, s, localCommand, properties(map[string]property.Value{
		"create": text("echo token is $TOKEN; false"), "environment": environment,
	}))
	assert.ErrorContains(t, err, "token is [secret]")
	assert.NotContains(t, err.Error(), "s3cr3t")

	_, err = create(t, s, localCommand, properties(map[string]property.Value{
		"create": text("login s3cr3t-token").WithSecret(true),
	}))
	assert.NotContains(t, err.Error(), "s3cr3t")
}

func TestCancelEndsTheWholeProcessGroup(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pid")
	s := server(t)
	inputs := check(t, s, localCommand, properties(map[string]property.Value{
		// The shell waits for a child that must not outlive it.
		"create": text("sleep 60 & echo $! > " + file + "; wait"),
	}))
	done := make(chan error, 1)
	go func() {
		_, err := s.Create(p.CreateRequest{Urn: urn(localCommand), Properties: inputs})
		done <- err
	}()
	var pid string
	require.Eventually(t, func() bool {
		content, _ := os.ReadFile(file)
		pid = strings.TrimSpace(string(content))
		return pid != ""
	}, 5*time.Second, 10*time.Millisecond)
	require.NoError(t, s.Cancel())
	select {
	case err := <-done:
		assert.Error(t, err)
	case <-time.After(15 * time.Second):
		t.Fatal("the command did not end")
	}
	assert.Eventually(t, func() bool { return ended(pid) }, 5*time.Second, 20*time.Millisecond)
}

// ended tells a process that is gone, or that waits to be collected by whoever adopted it.
func ended(pid string) bool {
	status, err := os.ReadFile("/proc/" + pid + "/stat")
	return err != nil || bytes.Contains(status, []byte(") Z "))
}

func TestParallelCommandsKeepTheirOutputApart(t *testing.T) {
	s := server(t)
	var group sync.WaitGroup
	for _, word := range []string{"a", "b", "c", "d"} {
		group.Add(1)
		go func() {
			defer group.Done()
			state := created(t, s, localCommand, properties(map[string]property.Value{"create": text("sleep 0.05; echo " + word)}))
			assert.Equal(t, word, state.Get("stdout").AsString())
		}()
	}
	group.Wait()
}
