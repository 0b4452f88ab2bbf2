// Draws images with a bundle: host BUNDLE INPUTS OUTPUTS.
//
// INPUTS, a safetensors file: latents [n, c, h, w] float32; class_labels [2 n] int64, those asked for and then "none";
// timesteps [steps] int64; coefficients [steps, 2] float32, the sampler's step x' = a x + b output; guidance [1] float32.
// OUTPUTS gets the images and the model's output at each step. The decisions are printed, F for a refresh, R for a reuse.
#include <iostream>

#include "bundle.h"

int main(int count, char** words) {
  if (count != 4) {
    std::cerr << "usage: host BUNDLE INPUTS OUTPUTS\n";
    return 2;
  }
  try {
    c10::InferenceMode guard;
    Bundle bundle(words[1]);
    Tensors inputs = load_tensors(words[2]), outputs;
    at::Tensor latents = inputs.at("latents"), timesteps = inputs.at("timesteps"), steps = inputs.at("coefficients");
    const double guidance = inputs.at("guidance")[0].item<double>();
    for (int64_t i = 0; i < timesteps.numel(); ++i) {
      at::Tensor both = at::cat({latents, latents});
      Tensors arguments = {{"hidden_states", both},
                           {"timestep", timesteps[i].expand({both.size(0)}).contiguous()},
                           {"class_labels", inputs.at("class_labels")}};
      at::Tensor output = bundle.step(arguments);
      outputs["step_" + std::to_string(i)] = output.clone();
      auto halves = output.chunk(2);
      at::Tensor guided = halves[1] + guidance * (halves[0] - halves[1]);
      latents = steps[i][0] * latents + steps[i][1] * guided;
    }
    outputs["images"] = latents.clamp(-1.0, 1.0);
    save_tensors(words[3], outputs);
    std::cout << bundle.decisions() << "\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
