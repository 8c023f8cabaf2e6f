package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/pulumi/pulumi/sdk/v3/go/property"
)

func shown(mode *Logging, stdout, stderr string) string {
	var lines []string
	capture := &Capture{redactor: strings.NewReplacer()}
	show := func(line string) { lines = append(lines, line) }
	capture.Stdout = capture.stream(&capture.out, mode.shows(LogStdout), show)
	capture.Stderr = capture.stream(&capture.err, mode.shows(LogStderr), show)
	fmt.Fprint(capture.Stdout, stdout)
	fmt.Fprint(capture.Stderr, stderr)
	capture.Outputs()
	return strings.Join(lines, "|")
}

func TestLoggingModeDecidesWhatIsShown(t *testing.T) {
	modes := map[Logging]string{LogStdout: "out", LogStderr: "err", LogStdoutAndStderr: "out|err", LogNone: ""}
	for mode, expected := range modes {
		assert.Equal(t, expected, shown(&mode, "out\n", "err\n"), mode)
	}
	assert.Equal(t, "out|err", shown(nil, "out\n", "err\n"), "without a mode both are shown")
}

func TestLinesAreShownWholeHoweverTheyArriveAndHoweverLong(t *testing.T) {
	long := strings.Repeat("x", 200_000)
	assert.Equal(t, "one|two|"+long, shown(nil, "one\ntwo\n"+long, ""))
}

func TestSecretsAreTakenOutWholeAndLineByLine(t *testing.T) {
	secret := func(text string) property.Value { return property.New(text).WithSecret(true) }
	properties := property.NewMap(map[string]property.Value{
		"environment": property.New(property.NewMap(map[string]property.Value{
			"A": secret("part"), "B": secret("part and whole"), "C": secret("first line\nsecond line"), "D": secret("x"),
		})),
		"connection": property.New(property.NewMap(map[string]property.Value{
			"host": property.New("machine"), "user": property.New("root"), "password": property.New("pass word"),
			"proxy": property.New(property.NewMap(map[string]property.Value{"privateKey": property.New("-----KEY-----")})),
		})).WithSecret(true),
		"create": property.New("public"),
	})
	hide := redactor(WithSecrets(context.Background(), properties)).Replace
	for text, expected := range map[string]string{
		"part and whole":           "[secret]",
		"part":                     "[secret]",
		"second line":              "[secret]",
		"x marks":                  "x marks",
		"root@machine: public":     "root@machine: public",
		"pass word":                "[secret]",
		"the key is -----KEY-----": "the key is [secret]",
	} {
		assert.Equal(t, expected, hide(text), text)
	}
}

func TestFailureShowsWhatLoggingShows(t *testing.T) {
	for mode, expected := range map[Logging]string{
		LogStdoutAndStderr: "status 1: running \"c\":\nout\nerr\n",
		LogStderr:          "status 1: running \"c\" (`logging` hides part of its output):\nerr\n",
		LogNone:            "status 1: running \"c\" (`logging` hides part of its output):\n",
	} {
		capture := NewCapture(context.Background(), &mode)
		fmt.Fprintln(capture.Stdout, "out")
		fmt.Fprintln(capture.Stderr, "err")
		assert.EqualError(t, capture.Failure(errors.New("status 1"), "c"), expected)
	}
}
